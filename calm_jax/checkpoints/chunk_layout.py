"""How arrays are split into chunks on disk, and which chunks a slice of an array needs.

The rule is part of the format of frozen folders: a model's fingerprint is computed from the hashes
of its chunks, so a change of the rule would change every fingerprint.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from calm_jax.errors import CalmError

# Small enough that a device with one of hundreds of slices reads little beyond its own; large
# enough that a large model is thousands of files, not millions.
CHUNK_BYTES = 2**23

Region = tuple[slice, ...]
Index = tuple[int, ...]  # position of a chunk in the grid of its array's chunks


class Layout:
    """Shapes of named arrays of one dtype, and the shape of each array's chunks.

    The first axis of the arrays in `stacked` is the layer; each of their chunks is of one layer.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], stacked: Collection[str], dtype: str):
        self.shapes = dict(shapes)
        self.dtype = np.dtype(dtype)
        self.chunks = {
            path: _chunk_shape(shape, self.dtype.itemsize, path in stacked)
            for path, shape in shapes.items()
        }

    def indices(self, path: str) -> Iterator[Index]:
        """All chunks of an array, in C order."""
        return _indices(self.shapes[path], self.chunks[path])

    def region(self, path: str, index: Index) -> Region:
        """The entries of an array that a chunk holds."""
        return _region(index, self.shapes[path], self.chunks[path])

    def touched(self, path: str, regions: Sequence[Region]) -> list[Index]:
        """The chunks of an array that overlap at least one of its `regions`, in C order."""
        found: set[Index] = set()
        for region in regions:
            sides = [
                range(side.start // size, -(-side.stop // size)) if side.start < side.stop else ()
                for side, size in zip(region, self.chunks[path], strict=True)
            ]
            found.update(itertools.product(*sides))
        return sorted(found)

    def split(
        self, path: str, array: np.ndarray, layer: int | None
    ) -> Iterator[tuple[Index, np.ndarray]]:
        """The chunks, as (index, view), of a whole array or of one of its layers."""
        chunk = self.chunks[path]
        if layer is not None:
            array = array[None]
        for index in _indices(array.shape, chunk):
            view = array[_region(index, array.shape, chunk)]
            yield index if layer is None else (layer, *index[1:]), view

    def check(self, written: Mapping[str, Any], where: str) -> None:
        """Compares this layout with a list that `Digests` wrote.

        Raises `CalmError` naming the first array that differs in dtype, presence, shape or chunks.
        """
        if written["dtype"] != self.dtype.name:
            raise CalmError(f"{where} is {written['dtype']}, the config says {self.dtype.name}")
        for path in sorted(self.shapes.keys() | written["arrays"].keys()):
            if path not in written["arrays"]:
                raise CalmError(f"{where}: {path} is missing")
            if path not in self.shapes:
                raise CalmError(f"{where}: {path} is not part of the model")
            for key, needed in (("shape", self.shapes[path]), ("chunk", self.chunks[path])):
                found = tuple(written["arrays"][path][key])
                if found != needed:
                    raise CalmError(f"{where}: {path} has {key} {found}, the model needs {needed}")


def overlap(a: Region, b: Region) -> Region | None:
    """The entries that two regions share; None if there are none."""
    shared = tuple(
        slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True)
    )
    return shared if all(side.start < side.stop for side in shared) else None


def relative(inner: Region, outer: Region) -> Region:
    """`inner`, counted from the start of `outer`, which contains it."""
    return tuple(
        slice(a.start - b.start, a.stop - b.start) for a, b in zip(inner, outer, strict=True)
    )


def _indices(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[Index]:
    return np.ndindex(*(-(-size // step) for size, step in zip(shape, chunk, strict=True)))


def _region(index: Index, shape: Sequence[int], chunk: Sequence[int]) -> Region:
    return tuple(
        slice(number * step, min((number + 1) * step, size))
        for number, size, step in zip(index, shape, chunk, strict=True)
    )


def _chunk_shape(shape: Sequence[int], itemsize: int, stacked: bool) -> tuple[int, ...]:
    """Halves the longest side (the first, if several are) until a chunk fits in `CHUNK_BYTES`."""
    chunk = list(shape)
    if stacked:
        chunk[0] = 1
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return tuple(chunk)
