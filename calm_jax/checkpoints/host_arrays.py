"""Arrays of the host on their way to disk: transposed, cast, and checked for NaN."""

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

# What is transposed at a time: as many rows as a cache line has entries, in a second-level cache.
_ROWS, _COLUMNS = 32, 4096


def all_finite(x: np.ndarray) -> bool:
    """Whether no entry is NaN or infinite; for bfloat16 without converting it."""
    if x.size == 0 or x.dtype != ml_dtypes.bfloat16:
        return bool(np.isfinite(x).all())
    # Infinity and NaN are the largest of positive whole numbers, and of negative ones unsigned.
    return int(x.view(np.int16).max()) < 0x7F80 and int(x.view(np.uint16).max()) < 0xFF80


def contiguous(
    view: np.ndarray,
    dtype: np.dtype,
    buffer: Callable[[tuple[int, ...]], np.ndarray] | None = None,
) -> np.ndarray:
    """The array in C order and `dtype`; a copy, in what `buffer` gives, unless it is so."""
    if view.dtype == dtype and view.flags.c_contiguous and view.flags.aligned:
        return view
    out = np.empty(view.shape, dtype) if buffer is None else buffer(view.shape)
    to = out
    if view.dtype == dtype:  # numpy copies bits in several threads at once, and bfloat16 in one
        bits = np.dtype(f"u{dtype.itemsize}")
        to, view = out.view(bits), view.view(bits)
    rows = _rows(view)
    if rows is None:
        to[...] = view
    else:
        _transpose(rows, to.reshape(rows.shape[::-1]))
    return out


def _rows(view: np.ndarray) -> np.ndarray | None:
    """The matrix, as it lies in memory, whose transpose the array is; None where there is none."""
    view = view.squeeze()
    longest = int(np.argmax(view.strides)) if view.ndim else 0
    if longest == 0:
        return None
    try:
        return view.reshape(math.prod(view.shape[:longest]), -1, copy=False).T
    except ValueError:
        return None


def _transpose(rows: np.ndarray, to: np.ndarray) -> None:
    # Where rows are a power of two apart, their entries fall on the same few lines of the nearest
    # cache, which are fetched again for each. So they are first laid out with another stride.
    padding = 32
    tile = np.empty((_ROWS, _COLUMNS + padding), to.dtype)
    for row in range(0, rows.shape[0], _ROWS):
        for column in range(0, rows.shape[1], _COLUMNS):
            part = rows[row : row + _ROWS, column : column + _COLUMNS]
            copy = tile[: part.shape[0], : part.shape[1]]
            copy[...] = part
            to[column : column + _COLUMNS, row : row + _ROWS] = copy.T
