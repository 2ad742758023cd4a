"""The layers of stacked tensors, read several at a time."""

import functools
import math

import numpy as np

from calm_jax.checkpoints.sources.source import Computed, Tensor

GROUP_BYTES = 2**30


def unstack(tensor: Tensor, axis: int, group_bytes: int = GROUP_BYTES) -> list[Computed]:
    """The layers of a tensor that stacks them along `axis`, to be read in order.

    One chunk on disk may span all layers, so reading one layer may decompress them all. Therefore
    reading a layer also reads as many of the next ones as fit in `group_bytes`, and keeps the group
    until its last layer is read: a tensor of up to that size is decompressed once, a larger one
    once for each group.
    """
    shape, dtype = (*tensor.shape[:axis], *tensor.shape[axis + 1 :]), np.dtype(tensor.dtype)
    layer_bytes = max(math.prod(shape) * dtype.itemsize, 1)
    stack = _Stack(tensor, axis, max(1, group_bytes // layer_bytes))
    return [
        Computed(shape, dtype, functools.partial(stack.read, layer))
        for layer in range(tensor.shape[axis])
    ]


class _Stack:
    """A tensor that keeps the last group of `count` layers that was read."""

    def __init__(self, tensor: Tensor, axis: int, count: int):
        self._tensor, self._axis, self._count = tensor, axis, count
        self._start, self._group = 0, None

    def read(self, layer: int) -> np.ndarray:
        layers = self._tensor.shape[self._axis]
        stop = min(self._start + self._count, layers)
        if self._group is None or not self._start <= layer < stop:
            self._start, stop = layer, min(layer + self._count, layers)
            self._group = None  # never two groups at once
            self._group = self._tensor[(slice(None),) * self._axis + (slice(layer, stop),)]
        found = np.take(self._group, layer - self._start, axis=self._axis)
        if layer == stop - 1:
            self._group = None
        return found
