"""Composes two frozen language models by training a bridge between them (CALM, arXiv 2401.02412).

Names load when they are first used, so that `import calm_jax` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

# Each public name and the module that defines it.
_MODULES = {
    "CompositionConfig": "calm_jax.models",
    "ComposedDecoder": "calm_jax.models",
    "Decoder": "calm_jax.models",
    "DecoderConfig": "calm_jax.models",
    "RopeScaling": "calm_jax.models",
    "compose": "calm_jax.models",
    "load": "calm_jax.checkpoints.frozen",
    "load_encoder": "calm_jax.checkpoints.encoder",
    "save_frozen": "calm_jax.checkpoints.frozen",
    "convert": "calm_jax.checkpoints.convert.conversion",
    "export": "calm_jax.checkpoints.convert.export",
    "export_bridge": "calm_jax.checkpoints.composed",
    "import_bridge": "calm_jax.checkpoints.huggingface.importing",
    "load_composed": "calm_jax.checkpoints.composed",
    "generate": "calm_jax.decoding",
    "Completion": "calm_jax.decoding",
    "Generator": "calm_jax.decoding",
    "Sampling": "calm_jax.decoding",
    "Score": "calm_jax.decoding",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'calm_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
