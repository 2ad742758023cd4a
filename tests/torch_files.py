"""Writes files as `torch.save` does, without torch."""

import re
import struct
import zipfile

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}
EMPTY_DICT = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if abs(value) < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def named(name: str) -> bytes:
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def tensor(key: str, dtype, size: int, offset: int, shape, strides, metadata=b"") -> bytes:
    """The pickled view of a storage; a dtype without a storage class is given by its name."""
    storage_class = STORAGES.get(dtype if isinstance(dtype, str) else np.dtype(dtype))
    storage = b"(" + text("storage")
    storage += named(f"torch.{storage_class}" if storage_class else "torch.storage.UntypedStorage")
    storage += text(key) + text("cpu") + number(size) + b"tQ"
    view = storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + EMPTY_DICT
    if storage_class:
        return named("torch._utils._rebuild_tensor_v2") + b"(" + view + metadata + b"tR"
    view += named(f"torch.{dtype}")
    return named("torch._utils._rebuild_tensor_v3") + b"(" + view + metadata + b"tR"


def parameter(pickled: bytes) -> bytes:
    """A tensor as `torch.nn.Parameter`."""
    return named("torch._utils._rebuild_parameter") + b"(" + pickled + b"\x88" + EMPTY_DICT + b"tR"


def dictionary(items: dict[str, bytes]) -> bytes:
    return EMPTY_DICT + b"(" + b"".join(text(k) + x for k, x in items.items()) + b"u"


def save(
    path,
    pickled: bytes,
    storages: dict[str, bytes],
    *,
    byteorder="little",
    protocol=2,
    **zip_options,
):
    """Writes an archive of a pickle and storages."""
    if protocol >= 4:  # names are taken from the stack
        pickled = re.sub(
            rb"c(collections|torch[\w.]*|os|posix|builtins)\n(\w+)\n",
            lambda found: text(found[1].decode()) + text(found[2].decode()) + b"\x93",
            pickled,
        )
    with zipfile.ZipFile(path, "w", **zip_options) as archive:
        archive.writestr("archive/data.pkl", bytes([0x80, protocol]) + pickled + b".")
        archive.writestr("archive/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")


def save_tensors(path, tensors: dict[str, np.ndarray], wrap=lambda pickled: pickled, **options):
    """Writes a state dict, each tensor with a storage of its own."""
    items, storages = {}, {}
    for key, (name, array) in enumerate(tensors.items()):
        array = np.array(array, order="C")
        strides = [stride // array.itemsize for stride in array.strides]
        items[name] = tensor(str(key), array.dtype, array.size, 0, array.shape, strides)
        storages[str(key)] = array.tobytes()
    save(path, wrap(dictionary(items)), storages, **options)
