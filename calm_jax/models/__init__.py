"""Decoders, bridges and composed models."""

from calm_jax.models.composed import ComposedDecoder, compose
from calm_jax.models.config import CompositionConfig, DecoderConfig, RopeScaling
from calm_jax.models.decoder import Decoder

__all__ = [
    "ComposedDecoder",
    "CompositionConfig",
    "Decoder",
    "DecoderConfig",
    "RopeScaling",
    "compose",
]
