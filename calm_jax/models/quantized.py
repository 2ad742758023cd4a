"""Frozen weights in int8 or int4.

A matrix W is stored as integers q with scales s, without a float copy; in a module, `query` is q
and `query_scale` is s.

int8: s, float32, is that of an output channel (of a row of the embedding), and has the axes of
`query` that its product does not sum over. It multiplies the product, x W ≈ (x q) s; every int8
value is exact in bfloat16.

int4: s, float16, is that of a group: up to 32 weights of one output channel, neighbours along the
last axis that its product sums over; it has the axes of `query`, with groups in place of that one.
The products multiply weights by their scales when they read them. Two weights share a byte: along
that axis `query`, uint8, is half as long, and in a group of 32 byte i has weight i in its low and
weight i + 16 in its high four bits. So a group is a block of GGUF's Q4_0, and its values are found
again. `jnp.int4` is not used: XLA's CPU backend unpacks whole stacks of it, to a byte a weight.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from calm_jax.errors import CalmError
from calm_jax.models.parameters import SCALE, Structure, Tree

GROUP = 32  # weights that share a scale in int4, or the largest even divisor of the axis below it
SMALLEST_GROUP = 8  # unless the axis is shorter: scales would take more bytes than weights
# Scales within this range are rounded to float16 by a 32nd at most.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-20, 65504.0


def quantize(weight: jax.Array, summed: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The nearest int8 values, ties to even, and their scales.

    Args:
        weight: a float matrix, with any number of leading axes.
        summed: the axes that its product sums over, as negative indices.

    Returns:
        q, int8 within ±127, in the shape of `weight`; and s, float32, without the axes `summed`:
        the largest |weight| of each channel / 127, or 1 if that is not a normal float32. So
        |weight - q s| <= s / 2, up to float32 rounding.
    """
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=summed, keepdims=True) / 127
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    return jnp.round(weight / scale).astype(jnp.int8), jnp.squeeze(scale, summed)


def quantize_in_groups(weight: jax.Array, summed: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The nearest int4 values, ties to even, and the scales of their groups.

    Args:
        weight: a float matrix, with any number of leading axes; no |weight| above 458,528.
        summed: the axes that its product sums over, as negative indices.

    Returns:
        q, uint8, two values to a byte along the last of the axes `summed`; and s, float16, with an
        entry for each group along it. The weight of a group that is furthest from zero becomes -8,
        or -7 where a weight of the other sign would be beyond 7 or the squared error is smaller; s
        has the sign for it, and is at least 2**-20. So |weight - q s| <= |s| / 2, up to float32
        rounding; and weights that are d times -8 to 7, d a float16 of at least 2**-20, with -8 or
        ±7 among them, are q s exactly.
    """
    axis = weight.ndim + max(summed)
    shape, size = weight.shape, weight.shape[axis]
    group = _group(size)
    blocks = weight.astype(jnp.float32).reshape(
        *shape[:axis], size // group, group, *shape[axis + 1 :]
    )
    low, high = (f(blocks, axis=axis + 1, keepdims=True) for f in (jnp.min, jnp.max))
    furthest = jnp.where(high > -low, high, low)

    def scale_of(steps):
        size = jnp.clip(jnp.abs(furthest) / steps, SMALLEST_SCALE, LARGEST_SCALE)
        return jnp.where(furthest > 0, -size, size).astype(jnp.float16)

    def rounded(scale):
        return jnp.round(blocks / scale.astype(jnp.float32))

    def error(scale):
        values = rounded(scale)
        errors = jnp.square(blocks - values * scale.astype(jnp.float32))
        return jnp.sum(jnp.where(values > 7, jnp.inf, errors), axis=axis + 1, keepdims=True)

    # Only scales are kept of both: their values would take more bytes than the errors.
    wide, fine = scale_of(7), scale_of(8)
    scale = jnp.where(error(fine) <= error(wide), fine, wide)
    values = jnp.clip(rounded(scale), -8, 7).astype(jnp.int8)
    first, second = jnp.split(values, 2, axis + 1)
    packed = jax.lax.bitcast_convert_type(second << 4 | first & 15, jnp.uint8)
    packed = packed.reshape(*shape[:axis], size // 2, *shape[axis + 1 :])
    return packed, jnp.squeeze(scale, axis + 1)


QUANTIZERS: dict[str, Callable] = {"int8": quantize, "int4": quantize_in_groups}


def unpacked(packed: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
    """The weights that int4 values stand for, q s, float32.

    Args:
        packed: uint8, two values to a byte along `axis`, which is not a negative index.
        scale: in the shape of `packed`, but along `axis` an entry for each group.
    """
    shape, groups = packed.shape, scale.shape[axis]
    before, half, after = shape[:axis], shape[axis] // groups, shape[axis + 1 :]
    pairs = jax.lax.bitcast_convert_type(packed, jnp.int8)
    pairs = pairs.reshape(*before, groups, 1, half, *after)
    # Shifts in int8 alone: in XLA's estimates for TPUs the fastest form, and the smallest.
    to_the_top = jnp.array([4, 0], jnp.int8).reshape(2, *[1] * (1 + len(after)))
    values = pairs << to_the_top >> 4
    values = values.reshape(*before, groups, 2 * half, *after).astype(jnp.float32)
    values *= jnp.expand_dims(scale.astype(jnp.float32), axis + 1)
    return values.reshape(*before, 2 * shape[axis], *after)


def kind_of(param: nnx.Param) -> str | None:
    """How a matrix is stored: "int8", "int4", or None for a float dtype."""
    return {"int8": "int8", "uint8": "int4"}.get(param.get_value().dtype.name)


def shape_of(param: nnx.Param) -> tuple[int, ...]:
    """The shape of a matrix, however it is stored."""
    shape = list(param.get_value().shape)
    if kind_of(param) == "int4":
        shape[max(param.get_metadata("summed"))] *= 2
    return tuple(shape)


def _group(size: int) -> int | None:
    """The largest even number up to `GROUP` that divides the size of an axis, if any does."""
    return next((g for g in range(min(size, GROUP), 1, -1) if size % g == g % 2 == 0), None)


def quantize_module(module: nnx.Module, kind: str) -> None:
    """Quantizes every matrix in `module`, stacked or not, in place.

    Args:
        kind: "int8" or "int4".

    Raises:
        CalmError: no group of int4 weights divides a matrix.
    """
    for path, part in list(nnx.iter_modules(module)):
        for name, param in list(vars(part).items()):
            if isinstance(param, nnx.Param) and param.has_metadata("summed"):
                axes, summed = param.get_metadata("axes"), param.get_metadata("summed")
                if kind == "int4":
                    size = param.get_value().shape[max(summed)]
                    _check_groups("/".join(map(str, (*path, name))), axes[max(summed)], size)
                values, scale = QUANTIZERS[kind](param.get_value(), summed)
                setattr(part, name, nnx.Param(values, **param.get_metadata()))
                setattr(part, name + SCALE, nnx.Param(scale, axes=_scale_axes(axes, summed, kind)))


def _check_groups(name: str, axis: str, size: int) -> None:
    if (_group(size) or 0) < min(size, SMALLEST_GROUP):
        raise CalmError(
            f"{name}: {axis} of size {size} has no even divisor from {SMALLEST_GROUP} to {GROUP}, "
            "the weights that share a scale in int4; load it as int8"
        )


def _scale_axes(axes: Sequence[str], summed: tuple[int, ...], kind: str) -> tuple[str, ...]:
    """Logical axes of a matrix's scales."""
    if kind == "int8":
        return tuple(axes[i] for i in range(-len(axes), 0) if i not in summed)
    return tuple(
        f"{axis}_groups" if i == max(summed) else axis for i, axis in enumerate(axes, -len(axes))
    )


def quantized_leaves(
    leaves: Iterable[tuple[str, jax.Array | Iterator[jax.Array]]],
    structure: Structure,
    shardings: Tree,
    kind: str,
) -> Iterator[tuple[str, jax.Array]]:
    """Quantizes the (path, array) pairs of a float decoder one by one; other arrays are unchanged.

    Each float array can be freed before the next is requested.

    Args:
        leaves: pairs of the float decoder in any order; a stacked matrix may also be an iterator
            of its layers.
        structure: the structure of the float decoder.
        shardings: the shardings of the quantized decoder.
        kind: "int8" or "int4".
    """
    summed = structure.summed()
    abstract = traverse_util.flatten_dict(structure.abstract(), sep="/")
    by_path = traverse_util.flatten_dict(shardings, sep="/")
    for path, array in leaves:
        if path in summed:
            layout = kind, summed[path], (by_path[path], by_path[path + SCALE])
            if isinstance(array, jax.Array):
                values, scale = jax.block_until_ready(_quantizer(*layout)(array))
            else:
                values, scale = _quantized_stack(array, abstract[path].shape, *layout)
            del array
            yield path, values
            yield path + SCALE, scale
        else:
            yield path, array


def _quantized_stack(
    layers: Iterator[jax.Array],
    shape: tuple[int, ...],
    kind: str,
    summed: tuple[int, ...],
    shardings,
) -> tuple[jax.Array, jax.Array]:
    """A quantized stack of this shape; `layers` are in C order of its leading axes."""
    quantizer = functools.partial(QUANTIZERS[kind], summed=summed)
    values, scale = (
        jnp.zeros(x.shape, x.dtype, device=sharding)
        for x, sharding in zip(
            jax.eval_shape(quantizer, jax.ShapeDtypeStruct(shape, jnp.float32)),
            shardings,
            strict=True,
        )
    )
    put = _layer_quantizer(kind, summed, shardings)
    for number, layer in enumerate(layers):
        at = np.unravel_index(number, shape[: len(shape) - layer.ndim])
        values, scale = jax.block_until_ready(put(values, scale, layer, np.array(at, np.int32)))
    return values, scale


@functools.cache
def _layer_quantizer(kind: str, summed: tuple[int, ...], shardings):
    """Compiled: writes a layer, quantized, into two donated stacks."""

    def put(values, scale, layer, at):
        def into(stack, x):
            start = (*at, *[0] * x.ndim)
            return jax.lax.dynamic_update_slice(stack, x.reshape((1,) * len(at) + x.shape), start)

        return tuple(map(into, (values, scale), QUANTIZERS[kind](layer, summed)))

    return jax.jit(put, donate_argnums=(0, 1), out_shardings=shardings)


@functools.cache
def _quantizer(kind: str, summed: tuple[int, ...], shardings):
    return jax.jit(functools.partial(QUANTIZERS[kind], summed=summed), out_shardings=shardings)
