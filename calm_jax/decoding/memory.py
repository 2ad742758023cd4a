"""The memory that the caches of decoding take on a device."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax import sharding
from calm_jax.errors import CalmError
from calm_jax.models import ComposedDecoder, CompositionConfig, Decoder, DecoderConfig
from calm_jax.models.connections import plan_connections
from calm_jax.models.cross_cache import CrossBytes, Mesh, cross_bytes, vector_bytes
from calm_jax.units import size


@dataclasses.dataclass(frozen=True)
class TokenBytes:
    """Bytes that a token takes in each cache, on a device that holds its row.

    Attributes:
        anchor: the anchor's keys and values.
        augments: keys and values of each augment.
        cross: f_cross' cache, for each augment.
    """

    anchor: int
    augments: tuple[int, ...]
    cross: tuple[CrossBytes, ...]

    @property
    def total(self) -> int:
        """Bytes in all caches, f_cross' in the form that is kept."""
        return self.anchor + sum(self.augments) + sum(each.kept for each in self.cross)


def token_bytes(
    anchor: DecoderConfig,
    augments: Sequence[DecoderConfig] = (),
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
        compositions: one for each of `augments`.
        dtype: dtype of the caches; default: that of each model, for f_cross the anchor's.
        mesh: splits key heads over devices if it divides them.
        whole: numbers of augments whose layers are all cached, such as one that drafts.
    """

    def of_layers(config: DecoderConfig, layers: int) -> int:
        heads, width = config.num_kv_heads, config.head_dim
        return 2 * layers * vector_bytes(heads, width, dtype or config.dtype, mesh)

    own = of_layers(anchor, anchor.num_layers)
    if not augments:
        return TokenBytes(own, (), ())
    plan = plan_connections(compositions, anchor.num_layers, [each.num_layers for each in augments])
    widths = [each.embed_dim for each in augments]
    depths = [
        augment.num_layers if number in whole else layers[-1] + 1
        for number, (augment, layers) in enumerate(zip(augments, plan.tap_layers, strict=True))
    ]
    return TokenBytes(
        own,
        tuple(map(of_layers, augments, depths)),
        cross_bytes(plan, compositions, anchor, widths, dtype or anchor.dtype, mesh),
    )


def bytes_per_token(
    model: Decoder | ComposedDecoder, dtype: Any = None, whole: Sequence[int] = ()
) -> int:
    """A model's `token_bytes` in all caches, on each device that holds the token's row."""
    mesh = sharding.current_mesh(jax.tree.leaves(nnx.state(model))[0])
    if isinstance(model, Decoder):
        return token_bytes(model.config, dtype=dtype, mesh=mesh).total
    if not isinstance(model, ComposedDecoder):  # decoders beside each other
        return sum(token_bytes(x.config, dtype=dtype, mesh=mesh).total for x in model.models)
    augments = [augment.config for augment in model.augments]
    return token_bytes(model.config, augments, model.configs, dtype, mesh, whole).total


def check_fits(model: Any, slots: int, length: int, dtype: Any, whole: Sequence[int] = ()) -> None:
    """Raises `CalmError` if the caches do not fit, naming the number of rows that would."""
    array = jax.tree.leaves(nnx.state(model))[0]
    free, mesh = free_bytes(array), sharding.current_mesh(array)
    if free is None:
        return
    row = bytes_per_token(model, dtype, whole) * length
    held = row * (slots // sharding.ways("batch", slots, mesh))
    if held > free:
        # A batch of `mesh.size` rows can always be split.
        fit = free // row * sharding.ways("batch", mesh.size, mesh)
        raise CalmError(
            f"the caches of {slots} rows of {length} tokens take {size(held)} on each device, "
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
