"""Decoders, bridges and composed models.

Modules are imported on first use, so that code that needs only a config does not import Flax.
"""

import importlib
from typing import Any

from calm_jax.models.config import CompositionConfig, DecoderConfig, RopeScaling

_MODULES = {
    "ComposedDecoder": "composed",
    "compose": "composed",
    "Decoder": "decoder",
    "Inputs": "inputs",
}

__all__ = [
    "ComposedDecoder",
    "CompositionConfig",
    "Decoder",
    "DecoderConfig",
    "Inputs",
    "RopeScaling",
    "compose",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'calm_jax.models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"calm_jax.models.{_MODULES[name]}"), name)
