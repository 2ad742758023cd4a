"""A small random augment that reads features."""

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax.models.taps import Taps


class Encoder(nnx.Module):
    """Each layer mixes the positions of an item, and never two items.

    Gradients reach its features, so that a test may ask what depends on them.
    """

    width, depth = 8, 3

    def __init__(self, rngs: nnx.Rngs, item_shape: tuple[int, int] = (3, 5)):
        positions, features = item_shape
        self.item_shape = item_shape
        self.into = nnx.Param(rngs.params.normal((features, self.width)) / features**0.5)
        self.turn = nnx.Param(rngs.params.normal((self.width, self.width)) / 3)
        self.mix = nnx.Param(rngs.params.normal((positions, positions)) / 2)

    def taps(self, inputs, layers, cache=None):
        B, S, F = inputs.features_BTD.shape
        x_BNPE = inputs.features_BTD.reshape(B, -1, self.item_shape[0], F) @ self.into[...]
        found = {}
        for layer in range(layers[-1] + 1):
            x_BNPE = jnp.tanh(jnp.einsum("BNPE,PQ,EG->BNQG", x_BNPE, self.mix[...], self.turn[...]))
            if layer in layers:
                found[layer] = x_BNPE.reshape(B, S, self.width)
        return Taps(found), cache


def random_items(seed: int, count: int, shape: tuple[int, int] = (3, 5)) -> list[jax.Array]:
    """Items of normal numbers."""
    return list(jax.random.normal(jax.random.key(seed), (count, *shape)))
