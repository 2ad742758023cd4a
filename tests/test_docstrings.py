"""The examples in the docstrings of the public API: those that say "at" point to another's."""

import doctest
import importlib

import pytest

MODULES = {
    "calm_jax.models.decoder": 1,
    "calm_jax.models.composed": 1,
    "calm_jax.models.config": 1,
    "calm_jax.checkpoints.frozen": 1,
    "calm_jax.checkpoints.composed": 1,
    "calm_jax.decoding.generator": 3,
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_show(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0
    assert tried >= MODULES[name]
