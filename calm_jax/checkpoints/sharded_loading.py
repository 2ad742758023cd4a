"""Reads a decoder's weights onto a mesh: each device reads only its own slice."""

import math
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from calm_jax.checkpoints.chunk_layout import Region
from calm_jax.checkpoints.chunks import Reader
from calm_jax.models.parameters import Structure, Tree, path_name

# The start of the paths of arrays that stack a decoder's layers.
LAYERS = "layers/"


def read_leaves(
    reader: Reader,
    structure: Structure,
    shardings: Tree,
    dtype: str,
    by_layer: Collection[str] = (),
) -> Iterator[tuple[str, jax.Array | Iterator[jax.Array]]]:
    """Yields (path, array) for every array of a decoder, in `dtype`.

    Whole arrays come first, in order of falling size: an array is briefly in memory twice, on the
    host and on its devices, which is cheapest while little else is loaded.

    The stacked arrays [L, ...] whose paths are in `by_layer` are yielded as iterators over their
    layers [...] in order, so that the whole stack never exists.

    Raises `CalmError` if a chunk is missing or damaged.
    """
    wanted = [
        (path_name(path), abstract.shape, sharding)
        for (path, abstract), sharding in zip(
            jax.tree.leaves_with_path(structure.abstract()), jax.tree.leaves(shardings), strict=True
        )
    ]
    streamed = {path for path in by_layer if path.startswith(LAYERS)}
    for path, shape, sharding in sorted(wanted, key=lambda x: (x[0] in streamed, -math.prod(x[1]))):
        read = _read_layers if path in streamed else _read_array
        yield path, read(reader, path, shape, sharding, dtype)


def _read_layers(
    reader: Reader, path: str, shape: tuple[int, ...], sharding: Sharding, dtype: Any
) -> Iterator[jax.Array]:
    """The layers of a stacked array, each split over devices as the stack would be."""
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    for layer in range(shape[0]):
        yield _read_array(reader, path, shape[1:], sharding, dtype, layer)


def _read_array(
    reader: Reader,
    path: str,
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: Any,
    layer: int | None = None,
) -> jax.Array:
    """The array of `shape` at `path`, or one layer of the stack there."""
    indices = {
        device: tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    first = () if layer is None else (slice(layer, layer + 1),)
    distinct = {_key(index): index for index in indices.values()}
    slices = reader.read(path, [(*first, *index) for index in distinct.values()])
    on_host: dict[Any, np.ndarray] = dict(zip(distinct, slices, strict=True))
    del slices
    users = [_key(index) for index in indices.values()]
    parts = []
    for number, (device, index) in enumerate(indices.items()):
        key = users[number]
        part = on_host[key].reshape([side.stop - side.start for side in index])
        parts.append(jax.device_put(part.astype(dtype, copy=False), device))
        if key not in users[number + 1 :]:
            parts[-1].block_until_ready()
            del on_host[key], part
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _key(index: Region) -> tuple[tuple[int, int], ...]:
    return tuple((part.start, part.stop) for part in index)
