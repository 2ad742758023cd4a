"""Stacked layers, scanned piece by piece, and where they are cut.

A piece of shape (L,) is scanned over its L layers. A piece of shape (G, L) is G groups of L layers:
an outer scan over the groups, an inner one over their layers. Compositions cut the stack at the
connected layers, once, so that no step slices or copies a stacked weight.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from calm_jax.models.attention import SelfAttentionInputs
from calm_jax.models.block import Block
from calm_jax.models.config import DecoderConfig
from calm_jax.models.parameters import stacked

Shape = tuple[int, ...]


class Stack(nnx.Module):
    """All layers of a decoder."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.config = config
        self.shapes: tuple[Shape, ...] = ((config.num_layers,),)
        self.pieces = nnx.List([stacked(lambda rngs: Block(config, rngs), keys)])

    def cut(self, shapes: Sequence[Shape]) -> None:
        """Cuts the stack in place into pieces of `shapes`, in order, one array at a time."""
        shapes = tuple(shapes)
        if sum(map(math.prod, shapes)) != self.config.num_layers:
            raise ValueError(f"pieces {shapes} do not hold {self.config.num_layers} layers")
        if shapes == self.shapes:
            return
        graphdef = nnx.graphdef(self.pieces[0])
        old_pieces = [dict(nnx.to_flat_state(nnx.state(piece))) for piece in self.pieces]
        self.pieces = nnx.List([])  # so that each array is freed as soon as it is cut
        new_pieces = [[] for _ in shapes]
        for path in list(old_pieces[0]):
            variables = [piece.pop(path) for piece in old_pieces]
            arrays = _recut([variable.get_value() for variable in variables], self.shapes, shapes)
            for new_piece, array in zip(new_pieces, arrays, strict=True):
                new_piece.append((path, variables[0].replace(array)))
        self.pieces = nnx.List(
            [nnx.merge(graphdef, nnx.from_flat_state(piece)) for piece in new_pieces]
        )
        self.shapes = shapes

    def run(self, piece: int, x_BTD: jax.Array, shared: SelfAttentionInputs, *, taps: bool = False):
        """Runs one piece.

        Returns:
            the output of its last layer [B, T, D] and, with `taps`, the outputs of its groups:
            [G, B, T, D] for a piece of shape (G, L), else [B, T, D]; without, None.
        """
        if len(self.shapes[piece]) == 1:
            x_BTD = self._scan(x_BTD, self._layers(piece), lambda layers: layers, shared)
            return x_BTD, (x_BTD if taps else None)

        def group(x_BTD, number):
            x_BTD = self.run_group(piece, number, x_BTD, shared)
            return x_BTD, (x_BTD if taps else None)

        numbers = jnp.arange(self.shapes[piece][0])
        return jax.lax.scan(group, x_BTD, numbers, unroll=shared.execution.unroll)

    def run_group(
        self, piece: int, group: jax.Array, x_BTD: jax.Array, shared: SelfAttentionInputs
    ) -> jax.Array:
        """Runs one group, by its number, of a piece of shape (G, L); `group` may be traced.

        Each layer is sliced from the whole piece: the slice of a group would be copied first.
        """
        layers = self._layers(piece)

        def layer(number):
            return jax.tree.map(functools.partial(_entry, group, number), layers)

        return self._scan(x_BTD, jnp.arange(self.shapes[piece][1]), layer, shared)

    def _layers(self, piece: int) -> tuple[nnx.State, jax.Array]:
        """A piece's parameters, and whether each layer is local; both lead with its shape."""
        start = sum(map(math.prod, self.shapes[:piece]))
        shape = self.shapes[piece]
        local = np.array(self.config.local_layers)[start : start + math.prod(shape)]
        return nnx.state(self.pieces[piece]), jnp.asarray(local.reshape(shape))

    def _scan(self, x_BTD: jax.Array, inputs: Any, layer_of: Callable, shared) -> jax.Array:
        """Runs the layers `layer_of(input)` for each of the stacked inputs, in order."""
        graphdef, execution = nnx.graphdef(self.pieces[0]), shared.execution

        def layer(x_BTD, layer_input):
            state, local = layer_of(layer_input)
            return nnx.merge(graphdef, state)(x_BTD, shared, local), None

        layer = execution.rematerialised(layer, in_loop=True)
        return jax.lax.scan(layer, x_BTD, inputs, unroll=execution.unroll)[0]


def _entry(group: jax.Array, number: jax.Array, x: jax.Array) -> jax.Array:
    """x[group, number]."""
    starts = (group, number, *[0] * (x.ndim - 2))
    return jax.lax.dynamic_slice(x, starts, (1, 1, *x.shape[2:])).reshape(x.shape[2:])


def cut_at(
    depth: int, last_layers: Sequence[int], stacked_groups: slice | None
) -> tuple[Shape, ...]:
    """Shapes of pieces that end at `last_layers` (ascending), and one of what is left of `depth`.

    The groups in `stacked_groups` are of one length and become one piece (G, L).
    """
    lengths = np.diff([-1, *last_layers]).tolist()
    shapes: list[Shape] = [(length,) for length in lengths]
    if stacked_groups is not None:
        group = lengths[stacked_groups]
        shapes[stacked_groups] = [(len(group), group[0])]
    rest = depth - 1 - last_layers[-1]
    return (*shapes, (rest,)) if rest else tuple(shapes)


def _recut(
    arrays: list[jax.Array], old: tuple[Shape, ...], new: tuple[Shape, ...]
) -> Sequence[jax.Array]:
    """One parameter's arrays of leading shapes `old` as arrays of leading shapes `new`."""
    place = getattr(arrays[0], "sharding", None)
    if isinstance(arrays[0], jax.core.Tracer) or not isinstance(place, NamedSharding):
        return _recutter(old, new, None)(arrays)
    weight_spec = (*place.spec, *[None] * arrays[0].ndim)[len(old[0]) : arrays[0].ndim]
    places = tuple(
        NamedSharding(place.mesh, PartitionSpec(*[None] * len(shape), *weight_spec))
        for shape in new
    )
    return _recutter(old, new, places)(arrays)


@functools.cache
def _recutter(old: tuple[Shape, ...], new: tuple[Shape, ...], places):
    """The compiled function, one for all parameters of one shape, in later compositions too."""

    def recut(arrays):
        flat = [x.reshape(-1, *x.shape[len(shape) :]) for x, shape in zip(arrays, old, strict=True)]
        whole = flat[0] if len(flat) == 1 else jnp.concatenate(flat)
        parts = jnp.split(whole, np.cumsum([math.prod(shape) for shape in new])[:-1])
        return tuple(
            part.reshape(*shape, *whole.shape[1:]) for part, shape in zip(parts, new, strict=True)
        )

    return jax.jit(recut, out_shardings=places)
