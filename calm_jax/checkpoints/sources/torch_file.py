"""Files of `torch.save`, read without torch and without running code from the pickle.

Such a file is an uncompressed zip archive: `NAME/data.pkl` is a pickle of names and views, and
`NAME/data/KEY` holds the bytes of one storage. As with torch's own `weights_only=True`, the pickle
may name only what a dictionary of tensors needs. Tensors are views of the mapped file; the CRC-32
of a storage is checked when one of its tensors is first read.
"""

import collections
import dataclasses
import functools
import io
import math
import mmap
import pickle
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from calm_jax.checkpoints.files import explained, refuse_lfs_pointer
from calm_jax.checkpoints.sources.source import Computed, Source, refuse_bucket
from calm_jax.errors import CalmError

# Names of dtypes that torch and numpy share.
_SAME = (
    "float64 float32 float16 complex128 complex64 int64 int32 int16 int8 uint64 uint32 uint16 uint8"
)
_DTYPES = {name: np.dtype(name) for name in (*_SAME.split(), "bool")} | {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
}
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}  # fmt: skip
# Keys under which training programs keep the parameters.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
_PREFIXES = ("module.", "_orig_mod.")  # of data-parallel and compiled modules
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number of torch < 1.6
_CRC_BYTES = 2**24  # checked at a time
_PICKLE_BYTES = 2**27  # a hundred times the pickles of the largest models


def read(path: epath.Path) -> Source:
    """Opens a file; no weight is read.

    Names are torch's own, such as "layers.0.weight"; a "module." or "_orig_mod." that starts all of
    them is removed. If the dictionary holds another one under "model", "state_dict",
    "model_state_dict" or "module", that one is read. Values other than tensors (numbers, texts,
    the state of an optimizer) are ignored.

    Raises:
        CalmError: the file is in a bucket, damaged, compressed, big-endian or older than torch 1.6;
            it has no dictionary of tensors, or several; or its pickle asks for anything else, which
            is named in the message and not run.
    """
    refuse_bucket(path)
    refuse_lfs_pointer(path)
    # Damaged pickles raise almost anything.
    with explained(f"{path} is not a complete zip file of torch.save"), path.open("rb") as file:
        if file.read(len(_BEFORE_ZIP)) == _BEFORE_ZIP:
            raise CalmError(
                f"{path} was saved by a torch before 1.6; load it with a current torch and "
                "save it again"
            )
        with zipfile.ZipFile(file) as archive:
            mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            return Source(path, "torch", _open_tensors(archive, mapped, path))


@dataclasses.dataclass
class StoredBytes:
    """A storage in the mapped file; tensors may share it."""

    content: np.ndarray
    crc: int
    checked: bool = False

    def read(self, view: np.ndarray, called: str) -> np.ndarray:
        """Returns `view`. Raises `CalmError` if the bytes are not those that were written."""
        if self.checked:
            return view
        crc = 0
        for start in range(0, self.content.size, _CRC_BYTES):
            crc = zlib.crc32(self.content[start : start + _CRC_BYTES], crc)
        if crc != self.crc:
            raise CalmError(f"{called} is damaged: its CRC-32 is {crc:08x}, not {self.crc:08x}")
        self.checked = True
        return view


# A pickle may call the objects that it gets and set their attributes. It therefore gets tuples,
# which have no attributes to set, instead of dtypes and functions; they are checked afterwards.


class _Name(NamedTuple):
    """A storage class or dtype of torch."""

    name: str


class _Storage(NamedTuple):
    storage_class: _Name
    key: str
    size: int  # in entries


class _View(NamedTuple):
    """A tensor; offset and strides count entries of `dtype` (None: the storage's dtype)."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: _Name | None


class _Function(NamedTuple):
    function: Callable[..., _View]

    def __call__(self, *arguments: Any) -> _View:
        return self.function(*arguments)


def _rebuild_tensor(storage, offset, shape, strides, *rest, dtype=None) -> _View:
    _, _, *metadata = rest  # requires_grad, hooks
    if any(metadata):
        raise CalmError(f"a tensor is stored as {metadata[0]!r}, which is not supported")
    return _View(storage, offset, shape, strides, dtype)


def _rebuild_tensor_of_dtype(storage, offset, shape, strides, grad, hooks, dtype, *rest) -> _View:
    return _rebuild_tensor(storage, offset, shape, strides, grad, hooks, *rest, dtype=dtype)


_PARAMETER = _Function(lambda tensor, *_: tensor)
_KNOWN = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor_v2": _Function(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": _Function(_rebuild_tensor_of_dtype),
    "torch._utils._rebuild_parameter": _PARAMETER,
    "torch._utils._rebuild_parameter_with_state": _PARAMETER,
    "torch.storage.UntypedStorage": _Name("UntypedStorage"),
    **{f"torch.{name}": _Name(name) for name in (*_STORAGES, *_DTYPES)},
}


class _Unpickler(pickle._Unpickler):  # a pickle can make the C version's memo fill the memory
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _KNOWN:
            raise CalmError(
                f"its pickle asks for {module}.{name}, which a dictionary of tensors does not "
                "need; it was not run"
            )
        return _KNOWN[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_class, key, _, size = pid
        if kind != "storage":
            raise CalmError(f"its pickle refers to {reprlib.repr(kind)}, not to a storage")
        return _Storage(storage_class, key, size)


def _open_tensors(
    archive: zipfile.ZipFile, mapped: np.ndarray, path: epath.Path
) -> dict[str, Computed]:
    roots = [
        name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")
    ]
    if len(roots) != 1:
        raise CalmError(f"{path} has {len(roots)} members data.pkl, not one")
    (root,) = roots
    if archive.getinfo(root + "data.pkl").file_size > _PICKLE_BYTES:
        raise CalmError(f"{path}: data.pkl has more than {_PICKLE_BYTES} bytes; save only tensors")
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED:
            raise CalmError(f"{path}: {member.filename} is compressed, which torch.save never does")
    if root + "byteorder" in archive.namelist():
        order = archive.read(root + "byteorder")
        if order != b"little":
            raise CalmError(f"{path}: byteorder is {order!r}; only b'little' is read")
    try:
        views = _state_dict(_Unpickler(io.BytesIO(archive.read(root + "data.pkl"))).load())
    except CalmError as error:
        raise CalmError(f"{path}: {error}") from None
    storages: dict[str, StoredBytes] = {}
    tensors = {}
    for name, view in views.items():
        called, key = f"{path}: tensor {name}", view.storage.key
        if key not in storages:
            storages[key] = _stored_bytes(archive, f"{root}data/{key}", mapped, called)
        array = _array(view, storages[key], called, mapped.size)
        values = functools.partial(storages[key].read, array, called)
        tensors[name] = Computed(array.shape, array.dtype, values)
    return tensors


def _state_dict(content: Any) -> dict[str, _View]:
    """The tensors of a state dict, which may be inside the usual wrappers, by name."""
    while isinstance(content, dict):
        inside = [key for key in _WRAPPERS if isinstance(content.get(key), dict)]
        if len(inside) > 1:
            raise CalmError(f"both {inside[0]!r} and {inside[1]!r} are dictionaries; save one")
        if not inside:
            break
        content = content.pop(inside[0])  # popped, since it may contain itself
    if not isinstance(content, dict):
        raise CalmError(f"it holds a {type(content).__name__}, not a dictionary of tensors")
    tensors = {name: x for name, x in content.items() if isinstance(x, _View)}
    if not tensors:
        raise CalmError(f"it holds no tensors, only {reprlib.repr(list(content))}")
    for name in tensors:
        if not isinstance(name, str):
            raise CalmError(f"a tensor is called {reprlib.repr(name)}, which is not a name")
    for prefix in (*_PREFIXES, *_PREFIXES[:1]):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return tensors


def _stored_bytes(
    archive: zipfile.ZipFile, name: str, mapped: np.ndarray, called: str
) -> StoredBytes:
    try:
        member = archive.getinfo(name)
    except KeyError:
        raise CalmError(f"{called}: {name} is missing") from None
    archive.open(member).close()  # compares the member's own header with the archive's index
    # The header: 26 bytes, the lengths of name and extra field, then both fields.
    lengths = struct.unpack_from("<2H", mapped, member.header_offset + 26)
    start = member.header_offset + 30 + sum(lengths)
    content = mapped[start : start + member.file_size]
    if content.size != member.file_size:
        raise CalmError(f"{called}: {name} ends after the file does")
    return StoredBytes(content, member.CRC)


def _array(view: _View, storage: StoredBytes, called: str, most_bytes: int) -> np.ndarray:
    """The view as an array of mapped bytes; it cannot read outside the storage."""
    stored_as = _STORAGES[view.storage.storage_class.name]
    itemsize = _DTYPES[stored_as].itemsize
    if storage.content.size != view.storage.size * itemsize:
        raise CalmError(
            f"{called}: storage {view.storage.key} has {storage.content.size} bytes, not "
            f"{view.storage.size} x {itemsize}"
        )
    dtype = _DTYPES[stored_as if view.dtype is None else view.dtype.name]
    sizes = (view.offset, *view.shape, *view.strides)
    if len(view.shape) != len(view.strides) or not all(type(x) is int and x >= 0 for x in sizes):
        raise CalmError(f"{called} has an invalid shape or strides")
    # numpy checks this too, but in 64 bits, which strides can overflow.
    entries = storage.content.size // dtype.itemsize
    last = view.offset + sum(
        (size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)
    )
    if 0 in view.shape:
        return np.zeros(view.shape, dtype)
    if last >= entries:
        raise CalmError(f"{called} reaches entry {last} of a storage of {entries}")
    # With strides of 0 a few bytes can pretend to be any number of weights.
    if math.prod(view.shape) * dtype.itemsize > most_bytes:
        raise CalmError(f"{called} has shape {view.shape}, more bytes than the whole file")
    return np.ndarray(
        view.shape,
        dtype,
        buffer=storage.content,
        offset=view.offset * dtype.itemsize,
        strides=[stride * dtype.itemsize for stride in view.strides],
    )
