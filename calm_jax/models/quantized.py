"""Frozen weights in int8.

A matrix W is stored as int8 q with one float32 scale s for each output channel (each row of the
embedding), symmetric: W ≈ q s. The scale multiplies the product, x W ≈ (x q) s, so that no float
copy of a weight is kept; every int8 value is exact in bfloat16. In a module `query` is q and
`query_scale` is s, with the axes of `query` that its product does not sum over.
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
    """The nearest int8 values, ties to even, and their scales; can be compiled.

    Args:
        weight: a float matrix, with any number of leading axes.
        summed: the axes that its product sums over.

    Returns:
        q, int8 within ±127 in the shape of `weight`; and s, float32, without the axes `summed`:
        the largest |weight| of a channel / 127, or 1 where that is no normal float32. Then
        |weight - q s| <= s / 2, up to float32 rounding.
    """
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=summed, keepdims=True) / 127
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    return jnp.round(weight / scale).astype(jnp.int8), jnp.squeeze(scale, summed)


def quantize_module(module: nnx.Module) -> None:
    """Quantizes every matrix in `module` in place, stacked or not."""
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
    """The (path, array) pairs of an int8 decoder from those of its float weights, one by one.

    Each float matrix can be freed before the next is asked for; all other arrays pass as they are.

    Args:
        leaves: the float decoder's, in any order; in place of stacked matrices their layers may
            come, one by one, each of which can be freed before the next is asked for.
        structure: of the float decoder, cut as the leaves are.
        shardings: of the int8 decoder, cut likewise.
    """
    summed = structure.summed()
    shapes = {
        path_name(p): leaf.shape for p, leaf in jax.tree.leaves_with_path(structure.abstract())
    }
    places = {path_name(path): place for path, place in jax.tree.leaves_with_path(shardings)}
    for path, array in leaves:
        if path in summed:
            form = summed[path], (places[path], places[path + SCALE])
            if isinstance(array, jax.Array):
                values, scale = jax.block_until_ready(_quantizer(*form)(array))
            else:
                values, scale = _quantized_stack(array, shapes[path], *form)
            del array
            yield path, values
            yield path + SCALE, scale
        else:
            yield path, array


def _quantized_stack(
    layers: Iterator[jax.Array], shape: tuple[int, ...], summed: tuple[int, ...], places
) -> tuple[jax.Array, jax.Array]:
    """`quantize` of a stack of this shape, whose layers come in C order of its leading axes."""
    kept = [size for axis, size in enumerate(shape, -len(shape)) if axis not in summed]
    values = jnp.zeros(shape, jnp.int8, device=places[0])
    scale = jnp.zeros(kept, jnp.float32, device=places[1])
    for number, layer in enumerate(layers):
        at = np.unravel_index(number, shape[: len(shape) - layer.ndim])
        put = _layer_quantizer(summed, places)
        values, scale = jax.block_until_ready(put(values, scale, layer, np.array(at, np.int32)))
    return values, scale


@functools.cache
def _layer_quantizer(summed: tuple[int, ...], places):
    """Puts the `quantize` of a layer to its place in two stacks, which are taken."""

    def put(values, scale, layer, at):
        def into(stack, x):
            start = (*at, *[0] * x.ndim)
            return jax.lax.dynamic_update_slice(stack, x.reshape((1,) * len(at) + x.shape), start)

        return tuple(map(into, (values, scale), quantize(layer, summed)))

    return jax.jit(put, donate_argnums=(0, 1), out_shardings=places)


@functools.cache
def _quantizer(summed: tuple[int, ...], places):
    """`quantize`, compiled once for all arrays of one form."""
    return jax.jit(functools.partial(quantize, summed=summed), out_shardings=places)
