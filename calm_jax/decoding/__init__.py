"""Decoding: a model's answers, cached, batched and sampled."""

from calm_jax.decoding.generator import Completion, Generator, Score, generate
from calm_jax.decoding.sampling import Sampling, TokenLogprob

__all__ = ["Completion", "Generator", "Sampling", "Score", "TokenLogprob", "generate"]
