"""Fixtures of the tests of checkpoints."""

import contextlib

import pytest

from calm_jax.checkpoints import chunk_layout, frozen


@pytest.fixture
def chunks_of(monkeypatch):
    """`with chunks_of(100): …` writes chunks of at most 100 bytes."""

    @contextlib.contextmanager
    def limit(size: int):
        with monkeypatch.context() as patch:
            patch.setattr(chunk_layout, "CHUNK_BYTES", size)
            frozen.layout_of.cache_clear()
            yield
        frozen.layout_of.cache_clear()

    return limit
