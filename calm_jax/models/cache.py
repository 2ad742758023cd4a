"""Caches of the keys and values of earlier tokens.

A cache is a pytree: a forward pass takes one and returns an updated one. A row has S slots; slot s
holds the row's s-th token, not counting padding. No query sees a slot after its own, so setting a
smaller length removes a row's last tokens.

Axes: B batch, P rows of the inputs, T new token, S slot, R slots that are read, L layer,
K key heads, H head width, G groups of features.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax import sharding
from calm_jax.errors import CalmError
from calm_jax.models.inputs import Inputs

INT8_MAX = 127.0

# Logical axes of `Vectors`: those of keys and values, and those of latents, which have one head.
KEY_AXES = ("layers", "batch", "kv_heads", "cache_length", "head_dim")
LATENT_AXES = ("layers", "batch", None, "cache_length", "augment_embed")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The tokens in the slots of a cache, and which of them a forward pass uses.

    Attributes:
        segments_BS: int32 [B, S], the segment of the token in each slot; 0: empty.
        prompt_mask_BS: int32 [B, S], 1 where the token belongs to the prompt.
        length_B: int32 [B], number of tokens in each row.
        order_BS: int32 [B, S], the order from which on queries see each slot, of those below the
            length; None: the slot's number.
        rows_P: int32 [P], the cache's row of each row of the inputs; B or more: it is dropped.
            None: all rows, in order.
        read: number of slots R that are read, from the first; None: all. It must cover the new
            tokens.
    """

    segments_BS: jax.Array
    prompt_mask_BS: jax.Array
    length_B: jax.Array
    order_BS: jax.Array | None = None
    rows_P: jax.Array | None = None
    read: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def empty(cls, batch: int, slots: int, *, ordered: bool = False) -> "Slots":
        """All slots empty; `ordered`: they have orders."""
        zeros_BS = sharding.constrain(jnp.zeros((batch, slots), jnp.int32), "batch", "cache_length")
        length_B = sharding.constrain(jnp.zeros(batch, jnp.int32), "batch")
        return cls(zeros_BS, zeros_BS, length_B, zeros_BS if ordered else None)

    @property
    def length_P(self) -> jax.Array:
        """int32 [P], number of tokens in each row that the inputs belong to."""
        return self.length_B if self.rows_P is None else self.length_B[self.rows_P]

    def using(self, rows_P: jax.Array | None = None, read: int | None = None) -> "Slots":
        """A copy whose next inputs belong to rows int32 [P] and read the first `read` slots."""
        return dataclasses.replace(self, rows_P=rows_P, read=read)

    def with_length(self, length_B: jax.Array) -> "Slots":
        """A copy whose rows end after `length_B` tokens, int32 [B]."""
        return dataclasses.replace(self, length_B=length_B)

    def slots_of(self, inputs: Inputs) -> jax.Array:
        """The slots of new `filled` inputs, int32 [P, T]; S for padding."""
        return jnp.where(inputs.segments_BT != 0, inputs.order_BT, self.segments_BS.shape[1])

    def write(self, inputs: Inputs, order_PT: jax.Array | None = None) -> "Slots":
        """A copy with the tokens of `filled` inputs [P, T], and their orders if slots have them."""
        slots_PT = self.slots_of(inputs)

        def put(x_BS, new_PT):
            if self.rows_P is not None:
                return x_BS.at[self.rows_P[:, None], slots_PT].set(new_PT, mode="drop")
            return jax.vmap(lambda x_S, *new: x_S.at[new[0]].set(new[1], mode="drop"))(
                x_BS, slots_PT, new_PT
            )

        prompt_mask_BS = self.prompt_mask_BS
        if inputs.prompt_mask_BT is not None:
            prompt_mask_BS = put(prompt_mask_BS, inputs.prompt_mask_BT)
        new_P = jnp.sum(inputs.segments_BT != 0, axis=1, dtype=jnp.int32)
        length_B = self.length_B
        if self.rows_P is None:
            length_B += new_P
        else:
            length_B = length_B.at[self.rows_P].add(new_P, mode="drop")
        return dataclasses.replace(
            self,
            segments_BS=put(self.segments_BS, inputs.segments_BT),
            prompt_mask_BS=prompt_mask_BS,
            length_B=length_B,
            order_BS=None if self.order_BS is None else put(self.order_BS, order_PT),
        )

    def keys(self) -> Inputs:
        """The slots that are read, as keys [P, R] in their order."""
        rows_P = slice(None) if self.rows_P is None else self.rows_P
        segments_PR, mask_PR = (
            x_BS[:, : self.read][rows_P] for x_BS in (self.segments_BS, self.prompt_mask_BS)
        )
        if self.order_BS is None:
            return Inputs(segments_BT=segments_PR, prompt_mask_BT=mask_PR)
        # What stands behind the length may have any order.
        held_PR = jnp.arange(segments_PR.shape[1]) < self.length_P[:, None]
        return Inputs(
            segments_BT=jnp.where(held_PR, segments_PR, 0),
            order_BT=self.order_BS[:, : self.read][rows_P],
            prompt_mask_BT=mask_PR,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vectors:
    """A vector for each of stacked layers, row, key head and slot.

    Attributes:
        values_LBKSH: [L, B, K, S, H], in a float dtype or int8.
        scales_LBKSG: float32 [L, B, K, S, G], the factor of int8 values in each of G equal groups
            of features; None for a float dtype.
        axes: the logical axes of [L, B, K, S, H], which say how it is sharded.
    """

    values_LBKSH: jax.Array
    scales_LBKSG: jax.Array | None = None
    axes: tuple[str | None, ...] = dataclasses.field(default=KEY_AXES, metadata={"static": True})

    @classmethod
    def empty(
        cls,
        layers: int,
        batch: int,
        heads: int,
        slots: int,
        head_dim: int,
        dtype: Any,
        axes: tuple[str | None, ...] = KEY_AXES,
        groups: int = 1,
    ) -> "Vectors":
        """Zeros, sharded by the rules if there is a mesh."""
        shape, scales_LBKSG = (layers, batch, heads, slots), None
        if jnp.dtype(dtype) == jnp.int8:
            scales_LBKSG = sharding.constrain(jnp.zeros((*shape, groups), jnp.float32), *axes)
        values_LBKSH = sharding.constrain(jnp.zeros((*shape, head_dim), dtype), *axes)
        return cls(values_LBKSH, scales_LBKSG, axes)

    def write(
        self, layer: jax.Array | int, slots: Slots, slots_PT: jax.Array, new_PTKH: jax.Array
    ) -> "Vectors":
        """A copy with vectors [P, T, K, H] of one layer at slots int32 [P, T].

        Tokens with a slot of S or more are dropped.
        """
        _, batch, heads, _, width = self.axes
        row_B = jnp.arange(self.values_LBKSH.shape[1])
        rows, rows_P = (batch, row_B) if slots.rows_P is None else (None, slots.rows_P)
        places = (slots_PT, rows_P, row_B, jnp.asarray(layer))
        axes_of_places = ((rows, "length"), (rows,), (batch,), ())

        def on_device(x_LBKSH, new_PTKH, slots_PT, rows_P, row_B, layer):
            row_P = rows_P - row_B[0]
            row_P = jnp.where(row_P < 0, len(row_B), row_P)  # a negative index counts from the end
            return _scattered(x_LBKSH, new_PTKH, slots_PT, row_P, layer)

        def put(x_LBKSH, new_PTKH):
            # Each device writes its own rows: one scatter over all devices would gather the batch.
            # A scatter for each row, by `vmap`, would copy the whole cache to move its row axis.
            return sharding.on_each_device(
                on_device,
                (x_LBKSH, new_PTKH.astype(x_LBKSH.dtype), *places),
                (self.axes, (rows, "length", heads, width), *axes_of_places),
            )

        if self.scales_LBKSG is None:
            return dataclasses.replace(self, values_LBKSH=put(self.values_LBKSH, new_PTKH))
        new_PTKH = new_PTKH.astype(jnp.float32)
        grouped_PTKGH = new_PTKH.reshape(*new_PTKH.shape[:-1], self.scales_LBKSG.shape[-1], -1)
        scales_PTKG = jnp.max(jnp.abs(grouped_PTKGH), axis=-1) / INT8_MAX
        scaled_PTKGH = (
            grouped_PTKGH / jnp.maximum(scales_PTKG, jnp.finfo(jnp.float32).tiny)[..., None]
        )
        return dataclasses.replace(
            self,
            values_LBKSH=put(self.values_LBKSH, jnp.round(scaled_PTKGH).reshape(new_PTKH.shape)),
            scales_LBKSG=put(self.scales_LBKSG, scales_PTKG),
        )

    def read(self, layer: jax.Array | int, slots: Slots, dtype: Any) -> jax.Array:
        """One layer's vectors in the slots to read, [P, R, K, H] in `dtype`."""

        def get(x_LBKSH):
            _, B, K, S, H = x_LBKSH.shape
            R = S if slots.read is None else slots.read

            def of_rows(row, count):
                part = jax.lax.dynamic_slice(x_LBKSH, (layer, row, 0, 0, 0), (1, count, K, R, H))
                return part[0]

            if slots.rows_P is None:
                return of_rows(0, B)
            return jax.vmap(lambda row: of_rows(row, 1)[0])(slots.rows_P)

        x_PKRH = get(self.values_LBKSH).astype(dtype)
        if self.scales_LBKSG is not None:
            scales_PKRG = get(self.scales_LBKSG).astype(dtype)
            x_PKRH *= jnp.repeat(scales_PKRG, x_PKRH.shape[-1] // scales_PKRG.shape[-1], axis=-1)
        return jnp.swapaxes(x_PKRH, 1, 2)


def _scattered(
    x_LBKSH: jax.Array, new_PTKH: jax.Array, slots_PT: jax.Array, row_P: jax.Array, layer: jax.Array
) -> jax.Array:
    """A copy of `x_LBKSH` with vectors at `layer`, `row_P` and `slots_PT`, those beyond dropped."""

    def scatter(x_LBKSH, new_PTKH, slots_PT):
        return x_LBKSH.at[layer, row_P[:, None], :, slots_PT].set(new_PTKH, mode="drop")

    def scatter_two(x_LBKSH, new_PTKH, slots_PT):
        slots_PT = jnp.pad(slots_PT, ((0, 0), (0, 1)), constant_values=x_LBKSH.shape[3])
        return scatter(x_LBKSH, jnp.pad(new_PTKH, ((0, 0), (0, 1), (0, 0), (0, 0))), slots_PT)

    if slots_PT.size > 1:
        return scatter(x_LBKSH, new_PTKH, slots_PT)
    # XLA's CPU backend repeats a single write for each reader of the cache, of which it makes a
    # copy each time. A second write, which is dropped, prevents that.
    return jax.lax.platform_dependent(x_LBKSH, new_PTKH, slots_PT, cpu=scatter_two, default=scatter)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Rotated keys and values of stacked layers."""

    keys: Vectors
    values: Vectors

    @classmethod
    def empty(
        cls, layers: int, batch: int, heads: int, slots: int, head_dim: int, dtype: Any
    ) -> "KeysValues":
        return cls(*(Vectors.empty(layers, batch, heads, slots, head_dim, dtype) for _ in range(2)))

    def write(
        self,
        layer: jax.Array | int,
        slots: Slots,
        slots_PT: jax.Array,
        k_PTKH: jax.Array,
        v_PTKH: jax.Array,
    ) -> "KeysValues":
        """As `Vectors.write`."""
        return KeysValues(
            self.keys.write(layer, slots, slots_PT, k_PTKH),
            self.values.write(layer, slots, slots_PT, v_PTKH),
        )

    def read(self, layer: jax.Array | int, slots: Slots, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """As `Vectors.read`."""
        return self.keys.read(layer, slots, dtype), self.values.read(layer, slots, dtype)


# One cache of stacked layers, or a cache with L = 1 for each layer that is not stacked.
LayerCaches = KeysValues | tuple[KeysValues, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderCache:
    """The cache of a decoder, or of an augment's layers up to its last tap."""

    layers: LayerCaches
    slots: Slots

    @property
    def depth(self) -> int:
        """Number of layers."""
        if isinstance(self.layers, tuple):
            return len(self.layers)
        return self.layers.keys.values_LBKSH.shape[0]

    def using(self, rows_P: jax.Array | None = None, read: int | None = None) -> "DecoderCache":
        """A copy with `Slots.using`."""
        return dataclasses.replace(self, slots=self.slots.using(rows_P, read))

    def with_length(self, length_B: jax.Array) -> "DecoderCache":
        """A copy with `Slots.with_length`."""
        return dataclasses.replace(self, slots=self.slots.with_length(length_B))

    def with_copy(self, source: jax.Array, target: jax.Array, count: int) -> "DecoderCache":
        """A copy whose row `target` has the first `count` slots of row `source`.

        Lengths do not change.
        """
        return with_copy(self, source, target, count)


def filled(inputs: Inputs, slots: Slots | None) -> tuple[Inputs, Slots | None]:
    """`inputs.filled`, after the tokens of a cache, and its slots with these added.

    Raises `CalmError` if the inputs of a cache have an order of their own: a cache orders tokens by
    their arrival.
    """
    if slots is None:
        return inputs.filled(), None
    if inputs.order_BT is not None:
        raise CalmError("a cache orders tokens by arrival; its inputs must not have an order_BT")
    inputs = inputs.filled(slots.length_P)
    return inputs, slots.write(inputs)


def with_copy(tree: Any, source: jax.Array, target: jax.Array, count: int) -> Any:
    """`DecoderCache.with_copy` for any tree of caches."""

    def copied(x):
        if x.ndim == 1:
            return x
        if x.ndim == 2:
            return x.at[target, :count].set(x[source, :count])
        return x.at[:, target, :, :count].set(x[:, source, :, :count])

    return jax.tree.map(copied, tree)
