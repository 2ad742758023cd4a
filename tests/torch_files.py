"""Writes files as `torch.save` does, without torch."""

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
    return b"J" + struct.pack("<i", value)


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(key: str, dtype, size: int, offset: int, shape, strides) -> bytes:
    """The pickled view of a storage."""
    storage = b"(" + text("storage") + f"ctorch\n{STORAGES[np.dtype(dtype)]}\n".encode()
    storage += text(key) + text("cpu") + number(size) + b"tQ"
    view = storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + EMPTY_DICT
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"tR"


def dictionary(items: dict[str, bytes]) -> bytes:
    return EMPTY_DICT + b"(" + b"".join(text(k) + x for k, x in items.items()) + b"u"


def save(path, pickled: bytes, storages: dict[str, bytes], *, byteorder="little", **zip_options):
    """Writes an archive of a pickle and storages."""
    with zipfile.ZipFile(path, "w", **zip_options) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
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
