"""Reads a decoder's weights straight to where they will stay: each device its own slice."""

import math
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from calm_jax.checkpoints.chunks import Reader, Region
from calm_jax.models.parameters import Structure, Tree, path_name

# Arrays below it stack the layers of a decoder.
LAYERS = "layers/"


def read_leaves(
    reader: Reader,
    structure: Structure,
    shardings: Tree,
    dtype: str,
    apart: Collection[str] = (),
) -> Iterator[tuple[str, jax.Array | Iterator[jax.Array]]]:
    """(path, array) of every array of a decoder.

    Of an array in `apart` that stacks layers, these come one by one, in their order. Arrays are
    read in `dtype`, whole ones first and the largest of them first: while one is both on the host
    and on its devices, little else is there. Raises `CalmError` as `Reader` does.
    """
    wanted = [
        (path_name(path), abstract.shape, sharding)
        for (path, abstract), sharding in zip(
            jax.tree.leaves_with_path(structure.abstract()), jax.tree.leaves(shardings), strict=True
        )
    ]

    def by_layers(path: str) -> bool:
        return path.startswith(LAYERS) and path in apart

    for path, shape, sharding in sorted(wanted, key=lambda x: (by_layers(x[0]), -math.prod(x[1]))):
        read = _read_layers if by_layers(path) else _read_array
        yield path, read(reader, path, shape, sharding, dtype)


def _read_layers(
    reader: Reader, path: str, shape: tuple[int, ...], sharding: Sharding, dtype: Any
) -> Iterator[jax.Array]:
    """The layers of what `_read_array` reads, each split as all of them would be."""
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
    """The array of `shape` at `path`, or one layer of it."""
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
