"""A GGUF file: metadata and tensors, most of them quantised, in one file.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf`
package dequantises a tensor when it is read. Its reader of whole files is not used: it makes an
array for every entry of every list, which takes seconds and hundreds of MiB for a large vocabulary,
and with a damaged list length it runs until memory is full.
"""

import dataclasses
import functools
import importlib.metadata
import math
import struct
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from calm_jax.checkpoints.files import explained, refuse_lfs_pointer
from calm_jax.checkpoints.sources.source import Source, refuse_bucket
from calm_jax.errors import CalmError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_AXES = 4
DEFAULT_ALIGNMENT = 32  # bytes
GROUP_VALUES = 2**24  # dequantised at a time, since that takes several times their memory
_FORMATS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h", GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?", GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip
_FLOATS = {
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F64: np.float64,
}


def read(path: epath.Path) -> Source:
    """Opens a file; no weight is read. The source's config is the file's unchanged metadata.

    Raises:
        CalmError: the file is in a bucket, damaged, big-endian or of another version, or a tensor
            is stored in a way that the installed `gguf` does not know.
    """
    refuse_bucket(path)
    refuse_lfs_pointer(path)
    with explained(f"{path} is not a complete GGUF file", (ValueError, OSError)):
        data = np.asarray(np.memmap(path, np.uint8, "r"))
        header = _Header(data)
        header.check_version()
        tensor_count, metadata_count = header.numbers("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = header.text()
            if key in metadata:
                raise ValueError(f"{key} occurs twice")
            metadata[key] = header.value()
        entries = [header.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        content = data[-(-header.position // alignment) * alignment :]
        tensors: dict[str, StoredTensor] = {}
        for entry in entries:
            if entry.name in tensors:
                raise ValueError(f"tensor {entry.name} occurs twice")
            tensors[entry.name] = entry.stored(content, str(path))
    return Source(path, "gguf", tensors, metadata)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a GGUF file; see `Tensor`. A quantised tensor is read as float32."""

    called: str
    shape: tuple[int, ...]
    stored_as: GGMLQuantizationType
    data: np.ndarray  # the mapped bytes

    @property
    def dtype(self) -> np.dtype:
        if not _is_readable(self.stored_as):
            raise CalmError(
                f"{self.called} is {self.stored_as.name}, which gguf "
                f"{importlib.metadata.version('gguf')} does not dequantise"
            )
        return np.dtype(_FLOATS.get(self.stored_as, np.float32))

    def __getitem__(self, index: Any) -> np.ndarray:
        if self.stored_as in _FLOATS:
            return self.data.view(self.dtype).reshape(self.shape)[index]
        width = self.shape[-1]
        rows = self.data.reshape(math.prod(self.shape[:-1]), -1)
        found = np.empty((len(rows), width), self.dtype)
        step = max(1, GROUP_VALUES // max(width, 1))
        for start in range(0, len(rows), step):
            group = slice(start, start + step)
            found[group] = dequantize(rows[group], self.stored_as)
        return found.reshape(self.shape)[index]


@functools.cache
def _is_readable(stored_as: GGMLQuantizationType) -> bool:
    if stored_as in _FLOATS:
        return True
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[stored_as][1]), np.uint8), stored_as)
    except NotImplementedError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor's entry in the header; `offset` is in bytes from the end of the header."""

    name: str
    shape: tuple[int, ...]
    stored_as: GGMLQuantizationType
    offset: int

    def stored(self, content: np.ndarray, where: str) -> StoredTensor:
        block_values, block_bytes = GGML_QUANT_SIZES[self.stored_as]
        if self.shape[-1] % block_values:
            raise ValueError(
                f"tensor {self.name} has rows of {self.shape[-1]} values, not a multiple of the "
                f"{block_values} in a block of {self.stored_as.name}"
            )
        stop = self.offset + math.prod(self.shape) // block_values * block_bytes
        if stop > content.size:
            raise ValueError(
                f"tensor {self.name} ends at byte {stop} of {content.size} after the header"
            )
        called = f"{where}: tensor {self.name}"
        return StoredTensor(called, self.shape, self.stored_as, content[self.offset : stop])


class _Header:
    """Reads the values at the start of a file one after another; raises `ValueError`."""

    def __init__(self, data: np.ndarray):
        self.position = 0
        self._data = memoryview(data)

    def _take(self, size: int) -> memoryview:
        start, self.position = self.position, self.position + size
        if self.position > len(self._data):
            raise ValueError(f"the header needs {self.position} bytes of {len(self._data)}")
        return self._data[start : self.position]

    def check_version(self) -> None:
        magic, (version,) = bytes(self._take(4)), self.numbers("I")
        if magic != MAGIC:
            raise ValueError(f"it starts with {magic!r}, not with {MAGIC!r}")
        if version not in VERSIONS:
            big_endian = version.to_bytes(4, "little")[:2] == b"\0\0"
            told = "big-endian" if big_endian else f"of version {version}"
            raise ValueError(f"it is {told}; versions {VERSIONS[0]} and {VERSIONS[1]} are read")

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        """Numbers of the given kinds, which are format letters of `struct`."""
        return struct.unpack("<" + kinds, self._take(struct.calcsize("<" + kinds)))

    def text(self) -> str:
        (size,) = self.numbers("Q")
        return str(self._take(size), "utf-8")

    def value(self) -> Any:
        """A number, a text, or a list of either."""
        (kind,) = self.numbers("I")
        if kind != GGUFValueType.ARRAY:
            return self._value(GGUFValueType(kind))
        kind, count = self.numbers("IQ")
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        if kind == GGUFValueType.ARRAY:
            raise ValueError("a list of lists is not supported")
        dtype = np.dtype("<" + _FORMATS[GGUFValueType(kind)])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        (value,) = self.numbers(_FORMATS[kind])
        # The shortest decimal number, as in the model's own config: 1e-05.
        return float(str(np.float32(value))) if kind == GGUFValueType.FLOAT32 else value

    def tensor(self) -> _Entry:
        name = self.text()
        (axes,) = self.numbers("I")
        if not 1 <= axes <= MOST_AXES:
            raise ValueError(f"tensor {name} has {axes} axes; from 1 to {MOST_AXES} are read")
        shape = self.numbers("Q" * axes)[::-1]
        kind, offset = self.numbers("IQ")
        known = [stored_as for stored_as in GGML_QUANT_SIZES if stored_as == kind]
        if not known:
            version = importlib.metadata.version("gguf")
            raise ValueError(f"tensor {name} is of type {kind}, which gguf {version} lacks")
        return _Entry(name, shape, known[0], offset)
