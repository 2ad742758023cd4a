"""A tree of arrays as one `.npz` file, whose members are named by their paths."""

import contextlib
import functools
import math
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from numpy.lib import format as npy

from calm_jax.checkpoints.files import explained, refuse_lfs_pointer
from calm_jax.checkpoints.sources.source import Computed, Source
from calm_jax.errors import CalmError

_DAMAGES = (
    EOFError,
    KeyError,
    NotImplementedError,  # a compression that zipfile does not know
    OSError,
    RuntimeError,  # an encrypted member
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


def read(path: epath.Path) -> Source:
    """Opens a file that `numpy.savez` wrote; only shapes and dtypes are read.

    Raises:
        CalmError: it is damaged, or holds Python objects, which could run code when they are read.
    """
    refuse_lfs_pointer(path)
    with _opened(path, str(path)) as archive:
        members = archive.infolist()
    tensors = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        called = f"{path}: tensor {name}"
        if name in tensors:
            raise CalmError(f"{called} occurs twice")
        with _opened(path, called) as archive, archive.open(member) as data:
            shape, dtype = _read_header(data, called)
            found, expected = member.file_size - data.tell(), math.prod(shape) * dtype.itemsize
        if found != expected:
            raise CalmError(f"{called} of shape {shape} has {found} bytes, not {expected}")
        if dtype == np.dtype("V2"):  # numpy does not know bfloat16 and writes it as raw bytes
            dtype = np.dtype(ml_dtypes.bfloat16)
        values = functools.partial(_read_array, path, member.filename, called, dtype)
        tensors[name] = Computed(shape, dtype, values)
    return Source(path, "npz", tensors)


def _read_array(path: epath.Path, filename: str, called: str, dtype: np.dtype) -> np.ndarray:
    with _opened(path, called) as archive, archive.open(filename) as data:
        return npy.read_array(data, allow_pickle=False).view(dtype)


def _read_header(data: Any, called: str) -> tuple[tuple[int, ...], np.dtype]:
    version = npy.read_magic(data)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(data)
    if dtype.hasobject:
        raise CalmError(f"{called} holds Python objects, which are not read")
    return shape, dtype


@contextlib.contextmanager
def _opened(path: epath.Path, called: str) -> Iterator[zipfile.ZipFile]:
    """The archive; damage found within the block becomes a `CalmError` about `called`."""
    explained_damages = explained(f"{called} cannot be read", _DAMAGES)
    with explained_damages, path.open("rb") as file, zipfile.ZipFile(file) as archive:
        yield archive
