"""Decoding."""

from calm_jax.decoding.generation import generate

__all__ = ["generate"]
