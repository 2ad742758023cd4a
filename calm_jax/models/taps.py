"""Taps: the hidden states of an augment after some of its layers, which the bridge reads.

Axes: B batch, S position, E augment width, G tapped layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from calm_jax.models.inputs import Inputs

# (hidden states [B, S, E], augment number, layer) -> the states that the bridge reads.
Perturb = Callable[[jax.Array, int, int], jax.Array]


class Augment(Protocol):
    """The interface that a composed model needs of an augment, which need not be a decoder.

    `calm_jax.Generator` alone takes decoders only, and augments that read features.

    An augment that reads features, not tokens, also has `item_shape`; see `item_shape` below.

    Attributes:
        width: E, the width of its hidden states.
        depth: number of layers.
    """

    width: int
    depth: int

    def taps(self, inputs: Inputs, layers: Sequence[int], cache: Any = None) -> tuple["Taps", Any]:
        """The states after each of `layers`, ascending, and the updated cache or None."""

    def init_cache(
        self, batch: int, slots: int, layers: int | None = None, dtype: Any = None
    ) -> Any:
        """An empty cache of the first `layers` layers, for `batch` rows of up to `slots` tokens.

        `dtype` is that of keys and values; default: the augment's own.
        """


def item_shape(augment: Augment) -> tuple[int, int] | None:
    """(P, F) of an augment that reads items of features, such as images; None: it reads tokens.

    An item is P positions in a row, of F features each. The augment finds the items of a row in
    `Inputs.features_BTD` [B, n · P, F], one after another, and has a state for each position. An
    item's states must not depend on later items. Such an augment needs no `init_cache`.
    """
    return getattr(augment, "item_shape", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Taps:
    """Hidden states after tapped layers.

    Attributes:
        by_layer: the states [B, S, E] of layers that ran one by one.
        stacked_layers: layers that ran in one loop.
        stacked: the states [G, B, S, E] of `stacked_layers`, or None.
    """

    by_layer: dict[int, jax.Array]
    stacked_layers: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    stacked: jax.Array | None = None

    def layer(self, layer: int) -> jax.Array:
        """The states [B, S, E] after one tapped layer."""
        if layer in self.by_layer:
            return self.by_layer[layer]
        return self.stacked[self.stacked_layers.index(layer)]

    def of(self, layers: tuple[int, ...], stacked: bool) -> jax.Array:
        """The states [G, B, S, E] after `layers`; if not `stacked`, [B, S, E] after the first."""
        if not stacked:
            return self.layer(layers[0])
        if layers == self.stacked_layers:
            return self.stacked
        return jnp.stack([self.layer(layer) for layer in layers])

    def perturbed(self, perturb: Perturb, augment: int) -> "Taps":
        """Every layer's states after `perturb`; the same, stacked or one by one."""
        by_layer = {layer: perturb(x, augment, layer) for layer, x in self.by_layer.items()}
        stacked = self.stacked
        if stacked is not None:
            layers = jnp.array(self.stacked_layers)
            stacked = jax.vmap(lambda x, layer: perturb(x, augment, layer))(stacked, layers)
        return Taps(by_layer, self.stacked_layers, stacked)


class TapNumbers:
    """Stands for `Taps` if a cache holds `layers`: gives the indices of layers among them."""

    def __init__(self, layers: Sequence[int]):
        self._layers = layers

    def of(self, layers: tuple[int, ...], stacked: bool) -> jax.Array | int:
        """int32 [G], the indices of `layers`; if not `stacked`, the index of the first."""
        numbers = [self._layers.index(layer) for layer in layers]
        return jnp.array(numbers, jnp.int32) if stacked else numbers[0]
