"""The layers of stacked tensors, read several at a time."""

from typing import Any

import numpy as np

from calm_jax.checkpoints.sources.source import Layer, Tensor

GROUP_BYTES = 2**30


def unstack(tensor: Tensor, axis: int, group_bytes: int = GROUP_BYTES) -> list[Layer]:
    """The layers of a tensor that stacks them along `axis`, to be read in order.

    One chunk on disk may span all layers, so reading one layer may decompress them all. Therefore
    reading a layer also reads as many of the next ones as fit in `group_bytes`, and keeps the group
    until its last layer is read: a tensor of up to that size is decompressed once, a larger one
    once for each group.
    """
    stack = _Stack(tensor, axis, group_bytes)
    return [Layer(stack, axis, layer) for layer in range(tensor.shape[axis])]


class _Stack:
    """A tensor that keeps the last group of layers that was read."""

    def __init__(self, tensor: Tensor, axis: int, group_bytes: int):
        self.shape, self.dtype = tuple(tensor.shape), np.dtype(tensor.dtype)
        self._tensor = tensor
        self._axis = axis
        layers = max(self.shape[axis], 1)
        layer_bytes = max(int(np.prod(self.shape)) * self.dtype.itemsize // layers, 1)
        self._count = max(1, group_bytes // layer_bytes)
        self._start, self._group = 0, None

    def __getitem__(self, index: tuple[Any, ...]) -> np.ndarray:
        """`index` is that of `Layer`: whole axes, then the number of a layer."""
        layer = index[self._axis]
        stop = min(self._start + self._count, self.shape[self._axis])
        if self._group is None or not self._start <= layer < stop:
            self._start, stop = layer, min(layer + self._count, self.shape[self._axis])
            self._group = None  # never two groups at once
            self._group = self._tensor[(*index[: self._axis], slice(layer, stop))]
        found = np.take(self._group, layer - self._start, axis=self._axis)
        if layer == stop - 1:
            self._group = None
        return found
