"""What the caches of decoding take of a device's memory."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax.errors import CalmError
from calm_jax.models import ComposedDecoder, Decoder
from calm_jax.models.config import heads
from calm_jax.units import size


def bytes_per_token(
    model: Decoder | ComposedDecoder, dtype: Any = None, whole: Sequence[int] = ()
) -> int:
    """Bytes of keys and values that a token takes in all caches of a model, by its configs.

    A decoder has 2·K·H values a layer, for K key heads of width H; an augment only up to its last
    tap; and f_cross 2·N·H a connection. int8 adds a float32 scale to each vector.

    Args:
        dtype: of the caches; default: that of each model.
        whole: numbers of augments of which every layer is cached, such as one that drafts.
    """
    if isinstance(model, Decoder):
        return _of_layers(model.config, model.depth, dtype)
    anchor = model.config
    total = _of_layers(anchor, model.anchor.depth, dtype)
    for number, layers in enumerate(model.plan.tap_layers):
        augment = model.augments[number]
        depth = augment.depth if number in whole else layers[-1] + 1
        total += _of_layers(augment.config, depth, dtype)
    for connection in model.connections:
        N, H = heads(model.configs[connection.augment], anchor)
        total += _of_vectors(2 * N, H, dtype or anchor.dtype)
    return total


def check_fits(model: Any, slots: int, length: int, dtype: Any, whole: Sequence[int] = ()) -> None:
    """Raises `CalmError`, which names the number of rows that fit, if the caches do not fit."""
    array = jax.tree.leaves(nnx.state(model))[0]
    free = free_bytes(array)
    if free is None:
        return
    devices = len(array.sharding.device_set)
    row = bytes_per_token(model, dtype, whole) * length / devices
    if slots * row > free:
        raise CalmError(
            f"the caches of {slots} rows of {length} tokens take {size(slots * row)} a device, "
            f"where {size(free)} are free; {max(0, math.floor(free / row))} rows would fit"
        )


def free_bytes(array: jax.Array) -> int | None:
    """Free memory of a device that holds `array`; None if the device does not tell."""
    statistics = next(iter(array.sharding.addressable_devices)).memory_stats()
    if not statistics or "bytes_limit" not in statistics:
        return None
    return statistics["bytes_limit"] - statistics["bytes_in_use"]


def _of_layers(config: Any, layers: int, dtype: Any) -> int:
    return layers * _of_vectors(2 * config.num_kv_heads, config.head_dim, dtype or config.dtype)


def _of_vectors(count: int, width: int, dtype: Any) -> int:
    dtype = jnp.dtype(dtype)
    return count * (width * dtype.itemsize + (4 if dtype == jnp.int8 else 0))
