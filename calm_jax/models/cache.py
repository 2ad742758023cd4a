"""Keys and values of tokens that were read before, so that no token is read twice.

A cache is a tree of arrays: a forward pass takes one and returns the next. Slot s of a row holds
its s-th token that is not padding; a slot of segment 0 is empty.

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
    """What layers attend to, stacked as their weights are.

    Attributes:
        keys_LBSKH, values_LBSKH: [L, B, S, K, H] in the dtype of the cache; keys are rotated.
    """

    keys_LBSKH: jax.Array
    values_LBSKH: jax.Array

    @classmethod
    def empty(
        cls, layers: int, batch: int, slots: int, heads: int, head_dim: int, dtype: Any
    ) -> "KeysValues":
        """Zeros, laid out by the sharding rules where there is a mesh."""
        shape = (layers, batch, slots, heads, head_dim)
        return cls(*(_laid_out(jnp.zeros(shape, dtype)) for _ in range(2)))

    def write(
        self, layer: jax.Array | int, slots_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
    ) -> "KeysValues":
        """With new tokens of one layer in `slots_BT`; those beyond the last slot are dropped."""

        # Row by row: a scatter over all of them would gather the whole batch on every device.
        def put(x_LSKH, new_TKH, slots_T):
            return x_LSKH.at[layer, slots_T].set(new_TKH.astype(x_LSKH.dtype), mode="drop")

        put = jax.vmap(put, in_axes=(1, 0, 0), out_axes=1)
        return KeysValues(
            _laid_out(put(self.keys_LBSKH, k_BTKH, slots_BT)),
            _laid_out(put(self.values_LBSKH, v_BTKH, slots_BT)),
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
    """What the slots of a cache hold.

    Attributes:
        segments_BS: int32 [B, S], the segment of the token in each slot; 0: none yet.
        prompt_mask_BS: int32 [B, S], 1 where that token is of the prompt.
        length_B: int32 [B], tokens in each row.
    """

    segments_BS: jax.Array
    prompt_mask_BS: jax.Array
    length_B: jax.Array

    @classmethod
    def empty(cls, batch: int, slots: int) -> "Slots":
        """No token in any slot."""
        zeros_BS = sharding.constrain(jnp.zeros((batch, slots), jnp.int32), "batch", "cache_length")
        return cls(zeros_BS, zeros_BS, sharding.constrain(jnp.zeros(batch, jnp.int32), "batch"))

    def slots_of(self, inputs: Inputs) -> jax.Array:
        """Int32 [B, T]: where `filled` inputs go; padding goes beyond the last slot."""
        return jnp.where(inputs.segments_BT != 0, inputs.order_BT, self.segments_BS.shape[1])

    def write(self, inputs: Inputs) -> "Slots":
        """With the tokens of `filled` inputs."""
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
        """The slots as keys: a slot's number is its place in the order."""
        return Inputs(segments_BT=self.segments_BS, prompt_mask_BT=self.prompt_mask_BS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderCache:
    """The cache of a decoder, or of an augment up to its last tap."""

    layers: KeysValues
    slots: Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ComposedCache:
    """The cache of a composed model.

    Attributes:
        anchor: the anchor's.
        augments: each augment's own, whatever that is.
        bridge: for each round, for each of its bridges, f_cross' keys and values of the taps, with
            a leading axis of the connections that a stacked round holds, else of 1.
    """

    anchor: DecoderCache
    augments: tuple[Any, ...]
    bridge: tuple[tuple[KeysValues, ...], ...]


def _laid_out(x_LBSKH: jax.Array) -> jax.Array:
    return sharding.constrain(x_LBSKH, "layers", "batch", "cache_length", "kv_heads", "head_dim")
