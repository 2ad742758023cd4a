"""Files of `torch.save`, read without torch and without running what a pickle asks for.

Such a file is a zip archive: `NAME/data.pkl`, a pickle of names and views, and `NAME/data/KEY`, the
bytes of each storage, not compressed. The pickle may name the few things that a dictionary of
tensors needs and nothing else, as with torch's own `weights_only=True`; tensors are views of the
mapped file. The archive has a CRC-32 of every storage, which is checked when it is first read.
"""

import collections
import dataclasses
import functools
import io
import math
import mmap
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from calm_jax.checkpoints.files import first_line, is_bucket
from calm_jax.checkpoints.sources.source import Source
from calm_jax.errors import CalmError

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# Where training programs put the parameters, beside the optimizer's state.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number of torch < 1.6
_LOCAL_HEADER = 30  # bytes before a member's name in the archive
_CRC_BYTES = 2**24  # checked at a time


def read(place: epath.Path) -> Source:
    """Opens a file; no weight is read.

    Names are those of the state dict, without a "module." that all have. Of a dictionary that holds
    a state dict under one of the usual names, that one is taken.

    Raises:
        CalmError: the file is on a bucket, damaged, compressed, of a torch before 1.6, big-endian,
            or needs anything but tensors in dictionaries, which is named and was not run.
    """
    if is_bucket(place):
        raise CalmError(f"{place} is on a bucket; copy the checkpoint to a disk first")
    with place.open("rb") as file:
        if file.read(len(_BEFORE_ZIP)) == _BEFORE_ZIP:
            raise CalmError(
                f"{place} was saved by a torch before 1.6; load it with torch and save it again"
            )
        try:
            archive = _Archive(place)
            content = _Unpickler(archive).load()
        except CalmError:
            raise
        except Exception as error:  # damaged pickles raise almost anything
            raise CalmError(
                f"{place} is no whole file of torch.save: {first_line(error)}"
            ) from error
    tensors = _state_dict(content, place)
    for name, tensor in tensors.items():
        tensor.check(name)
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): x for name, x in tensors.items()}
    return Source(place, "torch", tensors)


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """The bytes that tensors are views of."""

    archive: "_Archive"
    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class TorchTensor:
    """A view of a storage; offset and strides are in entries."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    def check(self, name: str) -> None:
        """Raises `CalmError` when the view does not lie within its storage and that in the file."""
        place, numbers = self.storage.archive.place, (self.offset, *self.shape, *self.strides)
        if not all(type(x) is int and x >= 0 for x in (*numbers, self.storage.size)) or len(
            self.shape
        ) != len(self.strides):
            raise CalmError(f"{place}: tensor {name} has no sensible shape and strides")
        last = self.offset + sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)
        )
        if math.prod(self.shape) and last >= self.storage.size:
            raise CalmError(
                f"{place}: tensor {name} reaches entry {last} of a storage of {self.storage.size}"
            )
        _, stored = self.storage.archive.span(self.storage.key)
        if stored != self.storage.size * self.dtype.itemsize:
            raise CalmError(
                f"{place}: tensor {name}: storage {self.storage.key} has {stored} bytes, not "
                f"{self.storage.size * self.dtype.itemsize}"
            )

    def __getitem__(self, index: Any) -> np.ndarray:
        data = self.storage.archive.data(self.storage.key).view(self.dtype)
        whole = np.lib.stride_tricks.as_strided(
            data[self.offset :],
            self.shape,
            [stride * self.dtype.itemsize for stride in self.strides],
            writeable=False,
        )
        return whole[index]


class _Archive:
    """The zip archive, its stored members mapped into memory."""

    def __init__(self, place: epath.Path):
        self.place = place
        with zipfile.ZipFile(place) as archive:
            self._members = {member.filename: member for member in archive.infolist()}
            pickles = [name for name in self._members if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CalmError(f"{place} has {len(pickles)} members data.pkl, not one")
            self._root = pickles[0].removesuffix("data.pkl")
            if self._root + "byteorder" in self._members:
                order = archive.read(self._root + "byteorder")
                if order != b"little":
                    raise CalmError(f"{place}: byteorder is {order!r}; only b'little' is read")
            self.pickled = archive.read(pickles[0])
        with place.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._checked: set[str] = set()

    def span(self, key: str) -> tuple[int, int]:
        """Where a storage starts in the file, and its bytes."""
        member = self._member(key)
        if member.compress_type != zipfile.ZIP_STORED:
            raise CalmError(f"{self.place}: {member.filename} is compressed; torch never does that")
        header = self._map[member.header_offset : member.header_offset + _LOCAL_HEADER]
        name_length, extra_length = (
            int.from_bytes(header[at : at + 2], "little") for at in (26, 28)
        )
        names = member.header_offset + _LOCAL_HEADER
        name = self._map[names : names + name_length]
        if not header.startswith(b"PK\x03\x04") or name != member.filename.encode():
            raise CalmError(f"{self.place}: {member.filename} is not where the archive says")
        start = names + name_length + extra_length
        if start + member.file_size > len(self._bytes):
            raise CalmError(f"{self.place}: {member.filename} ends after the file")
        return start, member.file_size

    def data(self, key: str) -> np.ndarray:
        """A storage's bytes, after their checksum was found right."""
        start, size = self.span(key)
        data = self._bytes[start : start + size]
        if key not in self._checked:
            parts = (data[at : at + _CRC_BYTES] for at in range(0, size, _CRC_BYTES))
            found = functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0)
            if found != self._member(key).CRC:
                raise CalmError(
                    f"{self.place}: {self._member(key).filename} is damaged: its CRC-32 is "
                    f"{found:08x}, not {self._member(key).CRC:08x}"
                )
            self._checked.add(key)
        return data

    def _member(self, key: str) -> zipfile.ZipInfo:
        name = f"{self._root}data/{key}"
        if name not in self._members:
            raise CalmError(f"{self.place}: {name} is missing")
        return self._members[name]


class _Unpickler(pickle.Unpickler):
    """Knows the names that a dictionary of tensors needs."""

    def __init__(self, archive: _Archive):
        super().__init__(io.BytesIO(archive.pickled), encoding="utf-8")
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if module == "torch" and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        if (module, name) not in known:
            raise CalmError(
                f"{self._archive.place}: its pickle asks for {module}.{name}, which a dictionary "
                "of tensors does not need; it was not run"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, size = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise CalmError(f"{self._archive.place}: its pickle refers to {pid!r}, no storage")
        return Storage(self._archive, key, dtype, size)


def _rebuild_tensor(storage, offset, shape, strides, *_) -> TorchTensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    return TorchTensor(storage, offset, tuple(shape), tuple(strides))


def _state_dict(content: Any, place: epath.Path) -> dict[str, TorchTensor]:
    """The tensors of a state dict, found within the usual wrappers."""
    while isinstance(content, Mapping):
        tensors = {k: x for k, x in content.items() if isinstance(x, TorchTensor)}
        if tensors:
            return {str(name): tensor for name, tensor in tensors.items()}
        inside = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        content = inside[0] if inside else None
    raise CalmError(f"{place} holds no dictionary of tensors")
