"""Reads a decoder's weights straight to where they will stay: each device its own slice."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from calm_jax.checkpoints.chunks import Reader, Region
from calm_jax.models.parameters import Structure, Tree, path_name
from calm_jax.models.stack import Shape

_PIECES = "layers/pieces/"


def read_leaves(
    reader: Reader,
    structure: Structure,
    shapes: Sequence[Shape],
    shardings: Tree,
    dtype: str,
    apart: Collection[str] = (),
) -> Iterator[tuple[str, jax.Array | Iterator[jax.Array]]]:
    """(path, array) of every array of a decoder whose layers are cut into `shapes`.

    Of an array in `apart` that stacks layers, these come one by one, in their order. Arrays are
    read in `dtype`, whole ones first and the largest of them first: while one is both on the host
    and on its devices, little else is there. Raises `CalmError` as `Reader` does.
    """
    starts = [sum(map(math.prod, shapes[:piece])) for piece in range(len(shapes))]
    places = jax.tree.leaves(shardings)
    wanted = [
        (path_name(path), abstract.shape, place)
        for (path, abstract), place in zip(
            jax.tree.leaves_with_path(structure.abstract()), places, strict=True
        )
    ]

    def order(entry) -> tuple:
        path, shape, _ = entry
        return path.startswith(_PIECES) and path in apart, -math.prod(shape), path

    for path, shape, place in sorted(wanted, key=order):
        if not path.startswith(_PIECES):
            yield path, _read_array(reader, path, None, shape, place, dtype)
            continue
        piece, rest = path.removeprefix(_PIECES).split("/", 1)
        stacked, first = shapes[int(piece)], starts[int(piece)]
        layers = slice(first, first + math.prod(stacked))
        array = (reader, f"layers/{rest}", layers, shape, place, dtype)
        yield path, _read_layers(*array, len(stacked)) if path in apart else _read_array(*array)


def canonical_path(path: str) -> str:
    """The path on disk of an array of a cut decoder."""
    if not path.startswith(_PIECES):
        return path
    return f"layers/{path.removeprefix(_PIECES).split('/', 1)[1]}"


def _read_layers(
    reader: Reader,
    path: str,
    layers: slice,
    shape: tuple[int, ...],
    place: Sharding,
    dtype: Any,
    stacked_axes: int,
) -> Iterator[jax.Array]:
    """The layers of what `_read_array` reads, each split as all of them would be."""
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec(*place.spec[stacked_axes:]))
    for layer in range(layers.start, layers.stop):
        one = slice(layer, layer + 1)
        yield _read_array(reader, path, one, shape[stacked_axes:], place, dtype)


def _read_array(
    reader: Reader,
    path: str,
    layers: slice | None,
    shape: tuple[int, ...],
    place: Sharding,
    dtype: Any,
) -> jax.Array:
    """An array of `shape`: all of `path`, or these layers of it in any number of leading axes."""
    indices = {
        device: tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
        for device, index in place.addressable_devices_indices_map(shape).items()
    }

    def on_disk(index: Region) -> Region:
        if layers is None:
            return index
        return (layers, *index[len(index) + 1 - reader.rank(path) :])

    distinct = {_key(index): index for index in indices.values()}
    slices = reader.read(path, [on_disk(index) for index in distinct.values()])
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
    return jax.make_array_from_single_device_arrays(shape, place, parts)


def _key(index: Region) -> tuple[tuple[int, int], ...]:
    return tuple((part.start, part.stop) for part in index)
