"""The memory that the caches of decoding take on a device."""

import dataclasses
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax import sharding
from calm_jax.errors import CalmError
from calm_jax.models import ComposedDecoder, CompositionConfig, Decoder, DecoderConfig
from calm_jax.models.connections import plan_connections
from calm_jax.models.cross_cache import CrossBytes, Mesh, cross_bytes, vector_bytes
from calm_jax.models.taps import Augment
from calm_jax.units import size

NONE: Mapping[int, int] = types.MappingProxyType({})
RESERVED = 0.1  # of the free memory, for what a step computes: logits, activations


@dataclasses.dataclass(frozen=True)
class TokenBytes:
    """Bytes that a token takes in each cache, on a device that holds its row.

    Attributes:
        anchor: the anchor's keys and values.
        augments: keys and values of each augment, for a token that it reads.
        cross: f_cross' cache, for each augment, for a token that it reads.
    """

    anchor: int
    augments: tuple[int, ...]
    cross: tuple[CrossBytes, ...]

    @property
    def total(self) -> int:
        """Bytes in all caches, f_cross' in the form that is kept, if all read the same tokens."""
        return self.of_row(1)

    def of_row(self, length: int, own: Mapping[int, int] = NONE) -> int:
        """Bytes of a row of `length` tokens.

        Args:
            own: the number of inputs of each augment with inputs of its own, by its number.
        """
        each = zip(self.augments, self.cross, strict=True)
        augments = (
            own.get(number, length) * (layers + cross.kept)
            for number, (layers, cross) in enumerate(each)
        )
        return length * self.anchor + sum(augments)


def token_bytes(
    anchor: DecoderConfig,
    augments: Sequence[DecoderConfig | Augment] = (),
    compositions: Sequence[CompositionConfig] = (),
    dtype: Any = None,
    mesh: Mesh | None = None,
    whole: Sequence[int] = (),
) -> TokenBytes:
    """The bytes of a token, from configs alone.

    A decoder has 2·K·H values in each layer, for K key heads of width H; an augment only up to its
    last tap; and f_cross 2·N·H for each connection, or E for each tapped layer. int8 adds a float32
    scale to each vector.

    Args:
        augments: their configs; of one that reads features the augment, which has no keys and
            values of its own.
        compositions: one for each of `augments`.
        dtype: dtype of the caches; default: that of each model, for f_cross the anchor's.
        mesh: splits key heads over devices if it divides them.
        whole: numbers of augments whose layers are all cached, such as one that drafts.
    """

    def of_layers(config: DecoderConfig | Augment, layers: int) -> int:
        if not isinstance(config, DecoderConfig):
            return 0
        heads, width = config.num_kv_heads, config.head_dim
        return 2 * layers * vector_bytes(heads, width, dtype or config.dtype, mesh)

    own = of_layers(anchor, anchor.num_layers)
    if not augments:
        return TokenBytes(own, (), ())
    widths, all_layers = zip(*map(_width_and_depth, augments), strict=True)
    plan = plan_connections(compositions, anchor.num_layers, all_layers)
    depths = [
        all_layers[number] if number in whole else layers[-1] + 1
        for number, layers in enumerate(plan.tap_layers)
    ]
    return TokenBytes(
        own,
        tuple(map(of_layers, augments, depths)),
        cross_bytes(plan, compositions, anchor, widths, dtype or anchor.dtype, mesh),
    )


def _width_and_depth(augment: DecoderConfig | Augment) -> tuple[int, int]:
    if isinstance(augment, DecoderConfig):
        return augment.embed_dim, augment.num_layers
    return augment.width, augment.depth


def bytes_per_row(
    model: Decoder | ComposedDecoder,
    length: int,
    dtype: Any = None,
    whole: Sequence[int] = (),
    own: Mapping[int, int] = NONE,
) -> int:
    """The bytes of `length` tokens of a row in all caches, on each device that holds the row.

    Args:
        own: the number of inputs of each augment with inputs of its own, by its number; default:
            `length`.
    """
    mesh = sharding.current_mesh(jax.tree.leaves(nnx.state(model))[0])
    if not isinstance(model, ComposedDecoder):  # a decoder, or several beside each other
        each = [token_bytes(x.config, dtype=dtype, mesh=mesh).total for x in model.models]
        return length * sum(each)
    augments = [x.config if isinstance(x, Decoder) else x for x in model.augments]
    sizes = token_bytes(model.config, augments, model.configs, dtype, mesh, whole)
    return sizes.of_row(length, own)


def check_fits(
    model: Any,
    slots: int,
    length: int,
    dtype: Any,
    whole: Sequence[int] = (),
    own: Mapping[int, int] = NONE,
) -> None:
    """Raises `CalmError` if the caches do not fit, naming the number of rows that would.

    `own` is as for `bytes_per_row`.
    """
    row = bytes_per_row(model, length, dtype, whole, own)
    inputs = "".join(f" and {count} inputs of augment {number}" for number, count in own.items())
    _check(model, slots, row, f"{length} tokens{inputs}")


def check_grows(model: Any, slots: int, dtype: Any, number: int, inputs: int) -> None:
    """Raises `CalmError` if larger caches of augment `number`, beside the old ones, do not fit."""
    row = bytes_per_row(model, 0, dtype, own={number: inputs})
    _check(model, slots, row, f"{inputs} inputs of augment {number}")


def _check(model: Any, slots: int, row: int, what: str) -> None:
    """Raises `CalmError` if so many rows of `row` bytes do not fit; `what` a row has."""
    array = jax.tree.leaves(nnx.state(model))[0]
    free, mesh = free_bytes(array), sharding.current_mesh(array)
    if free is None:
        return
    free = int(free * (1 - RESERVED))
    held = row * (slots // sharding.ways("batch", slots, mesh))
    if held > free:
        # A batch of `mesh.size` rows can always be split.
        fit = free // row * sharding.ways("batch", mesh.size, mesh)
        raise CalmError(
            f"the caches of {slots} rows of {what} take {size(held)} on each device, "
            f"but {size(free)} are free; {fit} rows would fit"
        )


def check_cache_dtype(dtype: Any) -> None:
    """Raises `CalmError` unless caches can have the dtype; None is the models' own."""
    try:
        known = dtype is None or jnp.dtype(dtype).name in ("float32", "bfloat16", "float16", "int8")
    except TypeError:
        known = False
    if not known:
        raise CalmError(f"cache_dtype is {dtype!r}; known are float32, bfloat16, float16 and int8")


def free_bytes(array: jax.Array) -> int | None:
    """Free memory of a device that holds `array`; None if the device does not report it.

    A CPU reports nothing: its devices share the machine's memory, of which all counts as free.
    """
    device = next(iter(array.sharding.addressable_devices))
    if device.platform == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total // device.client.local_device_count()
    statistics = device.memory_stats()
    if not statistics or "bytes_limit" not in statistics:
        return None
    return statistics["bytes_limit"] - statistics["bytes_in_use"]
