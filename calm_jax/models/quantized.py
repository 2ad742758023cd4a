"""Frozen weights in int8.

A matrix W is stored as int8 q with a float32 scale s for each output channel (for each row of the
embedding): W ≈ q s. The scale multiplies the product, x W ≈ (x q) s, so no float copy of W is
stored; every int8 value is exact in bfloat16. In a module, `query` is q and `query_scale` is s,
with the axes of `query` that its product does not sum over.
"""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm_jax.models.parameters import Structure, Tree, path_name

SCALE = "_scale"


def quantize(weight: jax.Array, summed: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The nearest int8 values, ties to even, and their scales.

    Args:
        weight: a float matrix, with any number of leading axes.
        summed: the axes that its product sums over.

    Returns:
        q, int8 within ±127, in the shape of `weight`; and s, float32, without the axes `summed`:
        the largest |weight| of each channel / 127, or 1 if that is not a normal float32. So
        |weight - q s| <= s / 2, up to float32 rounding.
    """
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=summed, keepdims=True) / 127
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    return jnp.round(weight / scale).astype(jnp.int8), jnp.squeeze(scale, summed)


def quantize_module(module: nnx.Module) -> None:
    """Quantizes every matrix in `module`, stacked or not, in place."""
    for _, part in list(nnx.iter_modules(module)):
        for name, param in list(vars(part).items()):
            if isinstance(param, nnx.Param) and param.has_metadata("summed"):
                axes, summed = param.get_metadata("axes"), param.get_metadata("summed")
                values, scale = quantize(param.get_value(), summed)
                kept = [axes[i] for i in range(-len(axes), 0) if i not in summed]
                setattr(part, name, nnx.Param(values, **param.get_metadata()))
                setattr(part, name + SCALE, nnx.Param(scale, axes=tuple(kept)))


def quantized_leaves(
    leaves: Iterable[tuple[str, jax.Array | Iterator[jax.Array]]],
    structure: Structure,
    shardings: Tree,
) -> Iterator[tuple[str, jax.Array]]:
    """Quantizes the (path, array) pairs of a float decoder one by one; other arrays are unchanged.

    Each float array can be freed before the next is requested.

    Args:
        leaves: pairs of the float decoder in any order; a stacked matrix may also be an iterator
            of its layers.
        structure: the structure of the float decoder.
        shardings: the shardings of the int8 decoder.
    """
    summed = structure.summed()
    shapes = {
        path_name(p): leaf.shape for p, leaf in jax.tree.leaves_with_path(structure.abstract())
    }
    by_path = {path_name(path): sharding for path, sharding in jax.tree.leaves_with_path(shardings)}
    for path, array in leaves:
        if path in summed:
            layout = summed[path], (by_path[path], by_path[path + SCALE])
            if isinstance(array, jax.Array):
                values, scale = jax.block_until_ready(_quantizer(*layout)(array))
            else:
                values, scale = _quantized_stack(array, shapes[path], *layout)
            del array
            yield path, values
            yield path + SCALE, scale
        else:
            yield path, array


def _quantized_stack(
    layers: Iterator[jax.Array], shape: tuple[int, ...], summed: tuple[int, ...], shardings
) -> tuple[jax.Array, jax.Array]:
    """`quantize` of a stack of this shape; `layers` are in C order of its leading axes."""
    kept = [size for axis, size in enumerate(shape, -len(shape)) if axis not in summed]
    values = jnp.zeros(shape, jnp.int8, device=shardings[0])
    scale = jnp.zeros(kept, jnp.float32, device=shardings[1])
    put = _layer_quantizer(summed, shardings)
    for number, layer in enumerate(layers):
        at = np.unravel_index(number, shape[: len(shape) - layer.ndim])
        values, scale = jax.block_until_ready(put(values, scale, layer, np.array(at, np.int32)))
    return values, scale


@functools.cache
def _layer_quantizer(summed: tuple[int, ...], shardings):
    """Compiled: writes the `quantize` of a layer into two donated stacks."""

    def put(values, scale, layer, at):
        def into(stack, x):
            start = (*at, *[0] * x.ndim)
            return jax.lax.dynamic_update_slice(stack, x.reshape((1,) * len(at) + x.shape), start)

        return tuple(map(into, (values, scale), quantize(layer, summed)))

    return jax.jit(put, donate_argnums=(0, 1), out_shardings=shardings)


@functools.cache
def _quantizer(summed: tuple[int, ...], shardings):
    """Compiled `quantize`."""
    return jax.jit(functools.partial(quantize, summed=summed), out_shardings=shardings)
