"""Arrays on disk in chunks, each of which is checked when it is read.

The files are an uncompressed zarr 3 checkpoint, one file per chunk, which Orbax and TensorStore
can read too. `chunks.json` in the same folder lists the XXH3 hash of every chunk (128 bits, against
damage, not against forgery).

Libraries do not replace this: zarr's crc32c codec does not notice chunk files that were exchanged
or copied over one another (3 of 60 such damages of each kind loaded as another model), and
fingerprints need a list of hashes in any case. Orbax saves only whole arrays: it held twice the
model in host memory, against 0.12 GB, and took 4.9 s of processor time per GB, against 1.3.
"""

import concurrent.futures
import hashlib
import json
import math
import os
import threading
from collections.abc import Sequence

import numpy as np
import tensorstore as ts
import xxhash
from etils import epath

from calm_jax.checkpoints.chunk_layout import Index, Layout, Region, overlap, relative
from calm_jax.checkpoints.files import explained, is_bucket, read_bytes, storage
from calm_jax.checkpoints.host_arrays import all_finite, contiguous
from calm_jax.checkpoints.sources.tensorstore_array import zarr_spec
from calm_jax.errors import CalmError

# A larger write asks the system for large blocks of memory, which are slow to get on a virtual
# machine that has returned them to its host.
_WRITE_BYTES = 2**17
WRITE_THREADS = min(os.cpu_count() or 1, 16)  # writing is bound by computation
_READ_THREADS = 2 * WRITE_THREADS  # reading mostly waits


class Digests:
    """The hash of every chunk of every array, added in any order.

    `sha256` is equal exactly if names, shapes, chunks, dtype and every byte are equal.
    """

    def __init__(self, layout: Layout):
        self._layout = layout
        self._found: dict[str, dict[Index, str]] = {path: {} for path in layout.shapes}

    def add(self, path: str, index: Index, data: np.ndarray) -> None:
        """Adds the hash of one chunk, which may have any memory order and float dtype."""
        self._found[path][index] = _digest(contiguous(data, self._layout.dtype))

    def text(self) -> str:
        """The list as JSON. Raises `KeyError` naming a chunk that was not added."""
        arrays = {
            path: {
                "shape": self._layout.shapes[path],
                "chunk": self._layout.chunks[path],
                "xxh3_128": [self._found[path][index] for index in self._layout.indices(path)],
            }
            for path in sorted(self._found)
        }
        return json.dumps({"dtype": self._layout.dtype.name, "arrays": arrays}, indent=1) + "\n"

    def sha256(self) -> str:
        return hashlib.sha256(self.text().encode()).hexdigest()


class Writer:
    """Writes arrays one by one, several chunks at a time; use it in a `with` block.

    Besides the arrays that it is given, it holds only a few chunks in memory.
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
        self, path: str, array: np.ndarray, *, layer: int | None = None, name: str = ""
    ) -> None:
        """Writes a whole array, or one layer of a stacked one.

        Args:
            path: the array's path in the layout.
            array: the values, in any memory order and float dtype; they are cast.
            layer: the number of the layer that `array` is; None: it is the whole array.
            name: the array's name in messages; default: its path.

        Raises:
            CalmError: the array holds NaN or infinity, before or after the cast, or cannot be
                written. A later call or the end of the `with` block may raise it.
        """
        for index, view in self._layout.split(path, array, layer):
            self._free.acquire()
            future = self._pool.submit(self._write, path, index, view, name or path)
            self._futures.add(future)
            future.add_done_callback(lambda _: self._free.release())
        self._raise_finished()

    def _write(self, path: str, index: Index, view: np.ndarray, name: str) -> None:
        data = contiguous(view, self._layout.dtype, self._buffer)
        if not all_finite(data):
            raise CalmError(_not_finite(view, name, self._layout.dtype))
        self.digests.add(path, index, data)
        chunk = self._layout.chunks[path]
        if data.shape != chunk:  # zarr pads the last chunk of an axis to the full size
            padded = np.zeros(chunk, data.dtype)
            padded[tuple(map(slice, data.shape))] = data
            data = padded
        file = _array_folder(self._folder, path) / _file_name(index)
        # Clients for buckets accept only bytes.
        plain = data.tobytes() if is_bucket(file) else data.reshape(-1).view(np.uint8)
        with storage("write", path), file.open("wb") as opened:
            for start in range(0, len(plain), _WRITE_BYTES):
                opened.write(plain[start : start + _WRITE_BYTES])

    def _buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        """This thread's own memory, reused for every chunk: new pages cost time."""
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
    """Reads slices of the arrays in a folder that holds `weights/` and `chunks.json`.

    Every chunk that a slice touches is checked. Raises `CalmError` if the list of chunks is
    missing, has another SHA-256, or does not describe the arrays of `layout`.
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
        self._digests = {
            path: dict(zip(layout.indices(path), entry["xxh3_128"], strict=True))
            for path, entry in written["arrays"].items()
        }
        self._stores: dict[str, ts.TensorStore] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(_READ_THREADS)

    def read(self, path: str, regions: Sequence[Region]) -> list[np.ndarray]:
        """Reads slices of one array, each in C order and the layout's dtype.

        Raises `CalmError` naming the array and a chunk that is missing or damaged.
        """
        layout = self._layout
        slices = [np.empty([side.stop - side.start for side in r], layout.dtype) for r in regions]
        if path not in self._stores:
            self._stores[path] = _open(self._folder, path, layout)
        store = self._stores[path]

        def read_chunk(index: Index) -> None:
            chunk = layout.region(path, index)
            with explained(f"{self._folder}: {path}", ValueError):
                data = np.ascontiguousarray(store[chunk].read().result())
            found, written = _digest(data), self._digests[path][index]
            if found != written:
                raise CalmError(
                    f"{self._folder}: {path}: chunk {_file_name(index)} is damaged: its hash is "
                    f"{found[:16]}, not {written[:16]}"
                )
            for target, region in zip(slices, regions, strict=True):
                if shared := overlap(chunk, region):
                    target[relative(shared, region)] = data[relative(shared, chunk)]

        for _ in self._pool.map(read_chunk, layout.touched(path, regions)):
            pass
        return slices

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


def _array_folder(folder: epath.Path, path: str) -> epath.Path:
    return folder / path.replace("/", ".")


def _file_name(index: Index) -> str:
    return ".".join(["c", *map(str, index)])


def _open(folder: epath.Path, path: str, layout: Layout, *, create: bool = False) -> ts.TensorStore:
    spec = zarr_spec(folder, _array_folder(folder, path).name, driver="zarr3") | {
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
    with explained(f"{folder}: {path}", ValueError):
        return ts.open(spec, open=not create, create=create).result()


def _write_orbax_metadata(folder: epath.Path, layout: Layout) -> None:
    """Writes the file that Orbax (0.12) reads first, so that its public API restores the arrays."""
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
