"""What an augment offers to be read by an anchor: its hidden states after some of its layers.

Axes: B batch, S position, E augment width, G tapped layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from calm_jax.models.inputs import Inputs

# (hidden states [B, S, E], augment, layer) -> the states to read instead.
Perturb = Callable[[jax.Array, int, int], jax.Array]


class Augment(Protocol):
    """All that a composed model asks of an augment, which need not be a decoder.

    Attributes:
        width: E, features of its hidden states.
        depth: number of its layers.
    """

    width: int
    depth: int

    def taps(self, inputs: Inputs, layers: Sequence[int], cache: Any = None) -> tuple["Taps", Any]:
        """Its states after each of `layers`, ascending, and the next cache (None without one)."""

    def init_cache(self, batch: int, slots: int, layers: int | None = None) -> Any:
        """An empty cache of its first `layers`, for `batch` rows of `slots` tokens."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Taps:
    """Hidden states after tapped layers; of layers that ran in one loop as one array.

    Attributes:
        by_layer: [B, S, E] of each layer that ran apart.
        stacked_layers: the layers of the loop.
        stacked: [G, B, S, E], or None.
    """

    by_layer: dict[int, jax.Array]
    stacked_layers: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    stacked: jax.Array | None = None

    def layer(self, layer: int) -> jax.Array:
        """[B, S, E] after one tapped layer."""
        if layer in self.by_layer:
            return self.by_layer[layer]
        return self.stacked[self.stacked_layers.index(layer)]

    def of(self, layers: tuple[int, ...], stacked: bool) -> jax.Array:
        """[G, B, S, E] after several layers, or [B, S, E] after one, unless `stacked`."""
        if not stacked:
            return self.layer(layers[0])
        if layers == self.stacked_layers:
            return self.stacked
        return jnp.stack([self.layer(layer) for layer in layers])

    def perturbed(self, perturb: Perturb, augment: int) -> "Taps":
        """Every hidden state through `perturb`, layer by layer however they ran."""
        by_layer = {layer: perturb(x, augment, layer) for layer, x in self.by_layer.items()}
        stacked = self.stacked
        if stacked is not None:
            layers = jnp.array(self.stacked_layers)
            stacked = jax.vmap(lambda x, layer: perturb(x, augment, layer))(stacked, layers)
        return Taps(by_layer, self.stacked_layers, stacked)
