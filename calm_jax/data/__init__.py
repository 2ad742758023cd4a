"""Text to batches. Only building data loads TensorFlow, seqio and TFDS; reading it does not."""

import importlib
from typing import Any

_HOMES = {
    "Vocabulary": "vocabulary",
    "load_vocabulary": "vocabularies",
    "open_dataset": "entries",
    "Dataset": "dataset",
    "Stream": "stream",
    "batches_once": "stream",
    "evaluation_examples": "entries",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
