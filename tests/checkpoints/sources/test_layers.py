"""Stacked tensors are read in groups of layers, and each group once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_jax.checkpoints.sources.layers import unstack


class Counting:
    """A tensor that remembers how many entries every read took."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.reads = array, array.shape, array.dtype, []

    def __getitem__(self, index):
        found = self.array[index]
        self.reads.append(found.size)
        return found


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    axis=st.integers(0, 1),
    group_bytes=st.integers(1, 500),
    order=st.randoms(use_true_random=False),
)
def test_layers_in_any_order(shape, axis, group_bytes, order):
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    layers = unstack(array, axis, group_bytes)
    assert len(layers) == shape[axis]
    numbers = list(range(len(layers))) * 2
    order.shuffle(numbers)
    for number in numbers:
        expected = np.take(array, number, axis)
        assert layers[number].shape == expected.shape
        np.testing.assert_array_equal(layers[number][...], expected)
        np.testing.assert_array_equal(layers[number][1:], expected[1:])


@pytest.mark.parametrize("layers, reads", [(1, 6), (2, 3), (4, 2), (6, 1), (100, 1)])
@pytest.mark.parametrize("axis", [0, 1])
def test_each_group_is_read_once(layers, reads, axis):
    tensor = Counting(np.zeros((6, 6, 10), np.float32))
    for layer in unstack(tensor, axis, group_bytes=layers * 6 * 10 * 4):
        layer[...]
    assert len(tensor.reads) == reads
    assert sum(tensor.reads) == tensor.array.size
