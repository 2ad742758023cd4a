"""Arrays in host memory on their way to disk: transposed, cast, and checked for NaN."""

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

# Each tile that is transposed fits in the second-level cache, and has as many rows as a cache line
# has entries.
_ROWS, _COLUMNS = 32, 4096


def all_finite(x: np.ndarray) -> bool:
    """Whether no entry is NaN or infinite. Entries of bfloat16 are not converted."""
    if x.size == 0 or x.dtype != ml_dtypes.bfloat16:
        return bool(np.isfinite(x).all())
    # As integers, NaN and infinity are the largest values: as signed ones among positive numbers,
    # as unsigned ones among negative numbers.
    return int(x.view(np.int16).max()) < 0x7F80 and int(x.view(np.uint16).max()) < 0xFF80


def contiguous(
    view: np.ndarray,
    dtype: np.dtype,
    buffer: Callable[[tuple[int, ...]], np.ndarray] | None = None,
) -> np.ndarray:
    """The array in C order and `dtype`.

    An array that already has both is returned; any other is copied into new memory, or into what
    `buffer` returns for its shape.
    """
    if view.dtype == dtype and view.flags.c_contiguous and view.flags.aligned:
        return view
    out = np.empty(view.shape, dtype) if buffer is None else buffer(view.shape)
    target = out
    if view.dtype == dtype:  # numpy copies integers in parallel threads, bfloat16 in one at a time
        bits = np.dtype(f"u{dtype.itemsize}")
        target, view = out.view(bits), view.view(bits)
    rows = _rows(view)
    if rows is None:
        target[...] = view
    else:
        _transpose(rows, target.reshape(rows.shape[::-1]))
    return out


def _rows(view: np.ndarray) -> np.ndarray | None:
    """The matrix in memory whose transpose the array is; None if there is none."""
    view = view.squeeze()
    longest = int(np.argmax(view.strides)) if view.ndim else 0
    if longest == 0:
        return None
    try:
        return view.reshape(math.prod(view.shape[:longest]), -1, copy=False).T
    except ValueError:
        return None


def _transpose(rows: np.ndarray, target: np.ndarray) -> None:
    # If rows are a power of two apart, the entries of a column compete for the same few lines of
    # the first-level cache. So each tile is first copied to rows with another stride.
    padding = 32
    tile = np.empty((_ROWS, _COLUMNS + padding), target.dtype)
    for row in range(0, rows.shape[0], _ROWS):
        for column in range(0, rows.shape[1], _COLUMNS):
            block = rows[row : row + _ROWS, column : column + _COLUMNS]
            copy = tile[: block.shape[0], : block.shape[1]]
            copy[...] = block
            target[column : column + _COLUMNS, row : row + _ROWS] = copy.T
