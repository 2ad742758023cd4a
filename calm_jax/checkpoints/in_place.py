"""Reads a decoder's weights straight to where they will stay: each device its own slice."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from calm_jax.checkpoints.chunks import Reader, Region
from calm_jax.models.parameters import Structure, Tree, path_name
from calm_jax.models.stack import Shape

_PIECES = "layers/pieces/"


def read_leaves(
    reader: Reader, structure: Structure, shapes: Sequence[Shape], shardings: Tree, dtype: str
) -> Iterator[tuple[str, jax.Array]]:
    """(path, array) of every array of a decoder whose layers are cut into `shapes`.

    Arrays are read in `dtype`, the largest first: while one is both on the host and on its devices,
    little else is on the host. Raises `CalmError` as `Reader` does.
    """
    starts = [sum(map(math.prod, shapes[:piece])) for piece in range(len(shapes))]
    places = jax.tree.leaves(shardings)
    wanted = [
        (path_name(path), abstract.shape, place)
        for (path, abstract), place in zip(
            jax.tree.leaves_with_path(structure.abstract()), places, strict=True
        )
    ]
    for path, shape, place in sorted(wanted, key=lambda entry: (-math.prod(entry[1]), entry[0])):
        stored, first, stacked_axes = path, 0, 0
        if path.startswith(_PIECES):
            piece, rest = path.removeprefix(_PIECES).split("/", 1)
            stored, first = f"layers/{rest}", starts[int(piece)]
            stacked_axes = len(shapes[int(piece)])
        yield path, _read_array(reader, stored, first, stacked_axes, shape, place, dtype)


def canonical_path(path: str) -> str:
    """The path on disk of an array of a cut decoder."""
    if not path.startswith(_PIECES):
        return path
    return f"layers/{path.removeprefix(_PIECES).split('/', 1)[1]}"


def _read_array(
    reader: Reader,
    path: str,
    first: int,
    stacked_axes: int,
    shape: tuple[int, ...],
    place: Sharding,
    dtype: Any,
) -> jax.Array:
    """An array of `shape`: all of `path`, or its layers from `first` on in `stacked_axes` axes."""
    indices = {
        device: tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
        for device, index in place.addressable_devices_indices_map(shape).items()
    }

    def on_disk(index: Region) -> Region:
        if not stacked_axes:
            return index
        layers = math.prod(shape[:stacked_axes])
        return (slice(first, first + layers), *index[stacked_axes:])

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
