"""Large arrays on disk, in chunks that are checked one by one.

A folder of arrays is an Orbax checkpoint of zarr 3 arrays, uncompressed, a file for each chunk, so
that any reader of either format reads it too. Beside it stands a list of the hash of every chunk
(XXH3, 128 bits: against damage, not against forgery): a reader of this module takes no byte that is
not as it was written, and needs no more of the files than its own slices touch.
"""

import concurrent.futures
import hashlib
import itertools
import json
import math
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
import xxhash
from etils import epath

from calm_jax.checkpoints.files import first_line, is_bucket, read_bytes, storage
from calm_jax.checkpoints.host_arrays import all_finite, contiguous
from calm_jax.errors import CalmError

# Small enough that a device of hundreds reads little beyond its own slice, and large enough that a
# model is thousands of files, not millions. How arrays are cut is part of the format of frozen
# folders: a model's fingerprint is made of the hashes of its chunks.
CHUNK_BYTES = 2**23
# Of one write to a file. Larger ones ask for large blocks of memory, which a virtual machine may
# have given back to its host, and which are dear to have again.
_WRITE_BYTES = 2**17
WRITE_THREADS = min(os.cpu_count() or 1, 16)  # they compute
_READ_THREADS = 2 * WRITE_THREADS  # they wait

Region = tuple[slice, ...]


class Layout:
    """Shapes of named arrays of one dtype, and where each is cut.

    The first axis of arrays in `stacked` is that of layers; no chunk holds more than one layer.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], stacked: Collection[str], dtype: str):
        self.shapes = dict(shapes)
        self.dtype = np.dtype(dtype)
        self.chunks = {
            path: _chunk_shape(shape, self.dtype.itemsize, path in stacked)
            for path, shape in shapes.items()
        }

    def touched(self, path: str, regions: Sequence[Region]) -> list[Region]:
        """The chunks of an array that overlap one of its `regions`, in C order."""
        shape, chunk = self.shapes[path], self.chunks[path]
        corners = set()
        for region in regions:
            if all(part.start < part.stop for part in region):
                starts = (
                    part.start // step * step for part, step in zip(region, chunk, strict=True)
                )
                corners |= set(_corners(starts, [part.stop for part in region], chunk))
        return [_chunk_at(corner, shape, chunk) for corner in sorted(corners)]

    def cut(
        self, path: str, block: np.ndarray, layer: int | None
    ) -> Iterator[tuple[Region, np.ndarray]]:
        """The chunks of a whole array or of one layer of it, as (region of the array, view)."""
        first = 0
        if layer is not None:
            block, first = block[None], layer
        for inside in _grid(block.shape, self.chunks[path]):
            rows = slice(first + inside[0].start, first + inside[0].stop)
            yield (rows, *inside[1:]), block[inside]

    def check(self, written: Mapping[str, Any], where: str) -> None:
        """Compares a list that `Digests` wrote.

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

    def count(self, path: str) -> int:
        """Number of an array's chunks."""
        return math.prod(
            -(-size // step)
            for size, step in zip(self.shapes[path], self.chunks[path], strict=True)
        )

    def number(self, path: str, region: Region) -> int:
        """Place of a chunk among those of its array, in C order."""
        place = 0
        for part, size, step in zip(region, self.shapes[path], self.chunks[path], strict=True):
            place = place * -(-size // step) + part.start // step
        return place


def _grid(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[Region]:
    for corner in _corners([0] * len(shape), shape, chunk):
        yield _chunk_at(corner, shape, chunk)


def _corners(
    starts: Iterable[int], stops: Sequence[int], chunk: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, starts, stops, chunk))


def _chunk_at(corner: Sequence[int], shape: Sequence[int], chunk: Sequence[int]) -> Region:
    return tuple(
        slice(start, min(start + step, size))
        for start, step, size in zip(corner, chunk, shape, strict=True)
    )


def _chunk_shape(shape: Sequence[int], itemsize: int, stacked: bool) -> tuple[int, ...]:
    chunk = list(shape)
    if stacked:
        chunk[0] = 1
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        largest = chunk.index(max(chunk))
        chunk[largest] = -(-chunk[largest] // 2)
    return tuple(chunk)


class Digests:
    """The hash of every chunk of every array, gathered in any order.

    `sha256` is the same exactly when names, shapes, chunks, dtype and every byte are.
    """

    def __init__(self, layout: Layout):
        self._layout = layout
        self._found: dict[str, list[str | None]] = {
            path: [None] * layout.count(path) for path in layout.shapes
        }

    def add(self, path: str, region: Region, data: np.ndarray) -> None:
        """Takes the digest of one chunk, in any memory order and float dtype."""
        data = contiguous(data, self._layout.dtype)
        self._found[path][self._layout.number(path, region)] = _digest(data)

    def text(self) -> str:
        """The list as JSON. Raises `ValueError` if a chunk is still missing."""
        for path, digests in self._found.items():
            if None in digests:
                raise ValueError(f"{path}: chunk {digests.index(None)} was not given")
        arrays = {
            path: {
                "shape": self._layout.shapes[path],
                "chunk": self._layout.chunks[path],
                "xxh3_128": self._found[path],
            }
            for path in sorted(self._found)
        }
        return json.dumps({"dtype": self._layout.dtype.name, "arrays": arrays}, indent=1) + "\n"

    def sha256(self) -> str:
        """SHA-256 of `text`."""
        return hashlib.sha256(self.text().encode()).hexdigest()


class Writer:
    """Writes arrays block by block, several chunks at a time; use it in a `with` block.

    No more than a few chunks are held beside the blocks that they are cut from.
    """

    def __init__(self, folder: epath.Path, layout: Layout):
        self.digests = Digests(layout)
        self._layout = layout
        self._folder = folder
        for path in layout.shapes:
            _open(folder, path, layout, create=True)
        _write_orbax_metadata(folder, layout)
        self._pool = concurrent.futures.ThreadPoolExecutor(WRITE_THREADS)
        self._buffers = threading.local()
        self._free = threading.BoundedSemaphore(2 * WRITE_THREADS)
        self._futures: set[concurrent.futures.Future] = set()

    def add(
        self, path: str, block: np.ndarray, *, layer: int | None = None, name: str = ""
    ) -> None:
        """Writes a whole array, or one layer of a stacked one.

        Args:
            path: of the array.
            block: in any memory order and any float dtype; it is cast.
            layer: which layer `block` is.
            name: what messages call the block; default: its path.

        Raises:
            CalmError: it holds NaN or infinity, before or after the cast, or cannot be written. May
                be raised by a later call, or at the end of the `with` block.
        """
        for region, view in self._layout.cut(path, block, layer):
            self._free.acquire()
            future = self._pool.submit(self._write, path, region, view, name or path)
            self._futures.add(future)
            future.add_done_callback(lambda _: self._free.release())
        self._raise_finished()

    def _write(self, path: str, region: Region, view: np.ndarray, name: str) -> None:
        data = contiguous(view, self._layout.dtype, self._buffer)
        if not all_finite(data):
            raise CalmError(_not_finite(view, name, self._layout.dtype))
        self.digests.add(path, region, data)
        chunk = self._layout.chunks[path]
        if data.shape != chunk:  # at the end of an axis zarr stores whole chunks too
            whole = np.zeros(chunk, data.dtype)
            whole[tuple(map(slice, data.shape))] = data
            data = whole
        numbers = (part.start // step for part, step in zip(region, chunk, strict=True))
        file = _array_folder(self._folder, path) / ".".join(["c", *map(str, numbers)])
        # A chunk is the file's plain bytes: written so, they are copied once.
        # Clients of buckets take nothing but bytes.
        plain = data.tobytes() if is_bucket(file) else data.reshape(-1).view(np.uint8)
        with storage("write", path), file.open("wb") as opened:
            for start in range(0, len(plain), _WRITE_BYTES):
                opened.write(plain[start : start + _WRITE_BYTES])

    def _buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        """This thread's own memory, used again for chunk after chunk: fresh pages cost time."""
        size = math.prod(shape)
        if not hasattr(self._buffers, "memory") or self._buffers.memory.size < size:
            self._buffers.memory = np.empty(size, self._layout.dtype)
        return self._buffers.memory[:size].reshape(shape)

    def _raise_finished(self) -> None:
        for future in [future for future in self._futures if future.done()]:
            self._futures.remove(future)
            future.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._raise_finished()


class Reader:
    """Reads slices of the arrays of a folder that holds `weights/` and `chunks.json`.

    Every chunk that a slice touches is checked. Raises `CalmError` when the list of chunks is
    missing, is not the one of that SHA-256, or describes other arrays than `layout`.
    """

    def __init__(self, folder: epath.Path, layout: Layout, sha256: str):
        path = folder / "chunks.json"
        text = read_bytes(path)
        found = hashlib.sha256(text).hexdigest()
        if found != sha256:
            raise CalmError(f"{path} is damaged: its SHA-256 is {found[:16]}, not {sha256[:16]}")
        written = json.loads(text)
        self._folder = folder / "weights"
        self._layout = layout
        layout.check(written, str(self._folder))
        self._digests = written["arrays"]
        self._stores: dict[str, ts.TensorStore] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(_READ_THREADS)

    def read(self, path: str, regions: Sequence[Region]) -> list[np.ndarray]:
        """Some slices of one array, each in C order.

        Raises `CalmError` naming the array and the chunk that is missing or not as it was written.
        """
        layout = self._layout
        out = [np.empty([part.stop - part.start for part in r], layout.dtype) for r in regions]
        if path not in self._stores:
            self._stores[path] = _open(self._folder, path, layout)
        store = self._stores[path]

        def read_chunk(chunk: Region) -> None:
            overlaps = [_overlap(chunk, region) for region in regions]
            number = layout.number(path, chunk)
            try:
                data = np.ascontiguousarray(store[chunk].read().result())
            except ValueError as error:
                raise CalmError(f"{self._folder}: {path}: {first_line(error)}") from error
            found, written = _digest(data), self._digests[path]["xxh3_128"][number]
            if found != written:
                raise CalmError(
                    f"{self._folder}: {path}: chunk {number} is damaged: its hash is "
                    f"{found[:16]}, not {written[:16]}"
                )
            for target, region, overlap in zip(out, regions, overlaps, strict=True):
                if overlap:
                    target[_within(overlap, region)] = data[_within(overlap, chunk)]

        for _ in self._pool.map(read_chunk, layout.touched(path, regions)):
            pass
        return out

    def rank(self, path: str) -> int:
        """Number of an array's axes."""
        return len(self._layout.shapes[path])

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)


def _not_finite(source: np.ndarray, name: str, dtype: np.dtype) -> str:
    if np.isfinite(source.astype(np.float32)).all():
        return f"tensor {name} has values too large for {dtype.name}; convert with --dtype=float32"
    return f"tensor {name} holds NaN or infinity"


def _digest(data: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(data.reshape(-1).view(np.uint8))


def _overlap(a: Region, b: Region) -> Region | None:
    both = tuple(
        slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True)
    )
    return both if all(part.start < part.stop for part in both) else None


def _within(part: Region, whole: Region) -> Region:
    return tuple(
        slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, whole, strict=True)
    )


def _array_folder(folder: epath.Path, path: str) -> epath.Path:
    return folder / path.replace("/", ".")


def _open(folder: epath.Path, path: str, layout: Layout, *, create: bool = False) -> ts.TensorStore:
    place = f"{_array_folder(folder, path)}/"
    spec = {
        "driver": "zarr3",
        "kvstore": place if is_bucket(folder) else {"driver": "file", "path": place},
        "fill_missing_data_reads": False,
        "metadata": {
            "shape": layout.shapes[path],
            "data_type": layout.dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": layout.chunks[path]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
    }
    try:
        return ts.open(spec, open=not create, create=create).result()
    except ValueError as error:
        raise CalmError(f"{folder}: {path}: {first_line(error)}") from error


def _write_orbax_metadata(folder: epath.Path, layout: Layout) -> None:
    """What Orbax reads first; the form of its version 0.12."""
    tree = {}
    for path, shape in layout.shapes.items():
        keys = path.split("/")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": list(shape),
            },
        }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (folder / "_METADATA").write_text(json.dumps(metadata))
