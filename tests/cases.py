"""Parametrised cases of which the default run takes some."""

from collections.abc import Container, Iterable

import pytest


def some_slow(names: Iterable[str], slow: Container[str]) -> list:
    """The names; those whose parts another name has too are slow tests."""
    return [pytest.param(x, marks=pytest.mark.slow) if x in slow else x for x in names]
