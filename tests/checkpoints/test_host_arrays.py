"""Arrays in any memory order become those of the disk, by comparison with numpy's own copies."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_jax.checkpoints.host_arrays import all_finite, contiguous

DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32]


@st.composite
def views(draw):
    """Cut from a larger array, steps included, with axes permuted and grouped otherwise."""
    shape = draw(st.lists(st.integers(1, 40), min_size=0, max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    x = (np.arange(np.prod(shape, dtype=int)) % 251).reshape(shape).astype(dtype)
    steps = st.sampled_from([slice(None), slice(1, None), slice(None, None, 2), slice(0, 3)])
    x = x[tuple(draw(steps) for _ in shape)]
    x = x.transpose(draw(st.permutations(range(x.ndim))))
    if draw(st.booleans()):
        x = np.broadcast_to(x, (2, *x.shape))
    return x


@given(views(), st.sampled_from(DTYPES), st.booleans())
def test_any_memory_order(view, dtype, with_buffer):
    dtype = np.dtype(dtype)
    memory = np.empty(view.size, dtype)
    found = contiguous(view, dtype, (lambda shape: memory.reshape(shape)) if with_buffer else None)
    assert found.dtype == dtype and found.flags.c_contiguous and found.shape == view.shape
    np.testing.assert_array_equal(found, view.astype(dtype), strict=True)


@pytest.mark.parametrize("shape", [(33, 5000), (4, 20, 4100), (8200, 31), (64, 4096)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_is_transposed_at_a_time(shape, dtype):
    source = np.random.default_rng(0).standard_normal(shape).astype(np.float32).astype(dtype)
    view = np.moveaxis(source, -1, 0)
    for wanted in map(np.dtype, DTYPES):
        np.testing.assert_array_equal(contiguous(view, wanted), view.astype(wanted), strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite(dtype, value):
    x = np.full((3, 5), ml_dtypes.finfo(dtype).max, dtype)
    x[0] = -x[0]
    x[1, 1] = -0.0
    assert all_finite(x)
    x[2, 3] = value
    assert not all_finite(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_finite(dtype):
    assert all_finite(np.zeros((0, 3), dtype))
