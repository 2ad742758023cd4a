import pathlib

import pytest

from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.data.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> pathlib.Path:
    """Where all these tests keep their data: what one has built the next one reads."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return load_vocabulary("key_value/tiny")


@pytest.fixture
def data(cache_dir):
    """Makes a `config.data` of tasks or entries."""

    def make(*train, **changes):
        entries = tuple(
            {"task": f"calm_jax/key_value/tiny/{entry}"} if isinstance(entry, str) else entry
            for entry in train
        )
        return {
            "cache_dir": str(cache_dir),
            "train": entries,
            "validation": entries,
            "length": 32,
            "pack": True,
            "strict": False,
            "seed": 0,
            "limit": 0,
        } | changes

    return make
