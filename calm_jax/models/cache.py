"""Caches of the keys and values of earlier tokens.

A cache is a pytree: a forward pass takes one and returns an updated one. A row has S slots; slot s
holds the row's s-th token, padding not counted. A slot of segment 0 is empty.

Axes: B batch, T new token, S slot, L layer, K key heads, H head width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax import sharding
from calm_jax.models.inputs import Inputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Keys and values of stacked layers.

    Attributes:
        keys_LBSKH, values_LBSKH: [L, B, S, K, H] in one dtype; keys are rotated.
    """

    keys_LBSKH: jax.Array
    values_LBSKH: jax.Array

    @classmethod
    def empty(
        cls, layers: int, batch: int, slots: int, heads: int, head_dim: int, dtype: Any
    ) -> "KeysValues":
        """Zeros, sharded by the rules if there is a mesh."""
        shape = (layers, batch, slots, heads, head_dim)
        return cls(*(_sharded(jnp.zeros(shape, dtype)) for _ in range(2)))

    def write(
        self, layer: jax.Array | int, slots_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
    ) -> "KeysValues":
        """A copy with the keys and values [B, T, K, H] of one layer at slots int32 [B, T].

        Tokens with a slot of S or more are dropped.
        """

        # Row by row: a scatter over all rows would gather the whole batch on every device.
        def put(x_LSKH, new_TKH, slots_T):
            return x_LSKH.at[layer, slots_T].set(new_TKH.astype(x_LSKH.dtype), mode="drop")

        put = jax.vmap(put, in_axes=(1, 0, 0), out_axes=1)
        return KeysValues(
            _sharded(put(self.keys_LBSKH, k_BTKH, slots_BT)),
            _sharded(put(self.values_LBSKH, v_BTKH, slots_BT)),
        )

    def of_layer(self, layer: jax.Array | int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H] of one layer, in `dtype`."""
        return tuple(
            jax.lax.dynamic_index_in_dim(x, layer, keepdims=False).astype(dtype)
            for x in (self.keys_LBSKH, self.values_LBSKH)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The tokens in the slots of a cache.

    Attributes:
        segments_BS: int32 [B, S], the segment of the token in each slot; 0: empty.
        prompt_mask_BS: int32 [B, S], 1 where the token belongs to the prompt.
        length_B: int32 [B], number of tokens in each row.
    """

    segments_BS: jax.Array
    prompt_mask_BS: jax.Array
    length_B: jax.Array

    @classmethod
    def empty(cls, batch: int, slots: int) -> "Slots":
        """All slots empty."""
        zeros_BS = sharding.constrain(jnp.zeros((batch, slots), jnp.int32), "batch", "cache_length")
        return cls(zeros_BS, zeros_BS, sharding.constrain(jnp.zeros(batch, jnp.int32), "batch"))

    def slots_of(self, inputs: Inputs) -> jax.Array:
        """The slots of new `filled` inputs, int32 [B, T]; S for padding."""
        return jnp.where(inputs.segments_BT != 0, inputs.order_BT, self.segments_BS.shape[1])

    def write(self, inputs: Inputs) -> "Slots":
        """A copy with the tokens of `filled` inputs [B, T]."""
        slots_BT = self.slots_of(inputs)

        @jax.vmap
        def put(x_S, slots_T, new_T):
            return x_S.at[slots_T].set(new_T, mode="drop")

        prompt_mask_BS = self.prompt_mask_BS
        if inputs.prompt_mask_BT is not None:
            prompt_mask_BS = put(prompt_mask_BS, slots_BT, inputs.prompt_mask_BT)
        return Slots(
            put(self.segments_BS, slots_BT, inputs.segments_BT),
            prompt_mask_BS,
            self.length_B + jnp.sum(inputs.segments_BT != 0, axis=1, dtype=jnp.int32),
        )

    def keys(self) -> Inputs:
        """The slots as keys [B, S], ordered by slot number."""
        return Inputs(segments_BT=self.segments_BS, prompt_mask_BT=self.prompt_mask_BS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderCache:
    """The cache of a decoder, or of an augment's layers up to its last tap."""

    layers: KeysValues
    slots: Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ComposedCache:
    """The cache of a composed model.

    Attributes:
        anchor: the anchor's.
        augments: the cache of each augment, of whatever type it uses.
        bridge: f_cross' keys and values, for each round and each entry of its plan; L is the number
            of connections in the entry.
    """

    anchor: DecoderCache
    augments: tuple[Any, ...]
    bridge: tuple[tuple[KeysValues, ...], ...]


def _sharded(x_LBSKH: jax.Array) -> jax.Array:
    return sharding.constrain(x_LBSKH, "layers", "batch", "cache_length", "kv_heads", "head_dim")
