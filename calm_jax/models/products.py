"""Products with weights that are float, int8 or int4, with or without a LoRA update.

Axes: B batch, T position, D model width, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax import sharding
from calm_jax.models.lora import lora_product
from calm_jax.models.parameters import SCALE
from calm_jax.models.quantized import unpacked


def product(
    equation: str, x: jax.Array, module: nnx.Module, name: str, *, dtype: jnp.dtype | None = None
) -> jax.Array:
    """`einsum(equation, x, W)` for the matrix `name` of `module`, computed in the dtype of `x`.

    Args:
        equation: must end with the axes of W that are not summed over.
        dtype: of the result; default: that of `x`.
    """
    weight, scale = getattr(module, name)[...], getattr(module, name + SCALE, None)

    def multiply(x, weight):
        weight = weight.astype(x.dtype)
        if dtype is None or dtype == x.dtype:
            return contract(equation, x, weight)
        return _wide_product(equation, dtype, x, weight)

    # Recomputed in the backward pass: a scan over layers would store all weights cast to float.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def scaled(x, weight, scale):
        y = multiply(x, weight)
        return (y * scale).astype(y.dtype)

    if scale is None:
        y = multiply(x, weight)
    elif scale.ndim == weight.ndim:
        result = None if dtype == x.dtype else dtype
        # Gathered as they are: XLA would unpack first, and gather more than three times the bytes.
        parts = (_gathered(param) for param in (getattr(module, name), scale))
        y = _product_in_groups(equation, x.dtype, result, x, *parts)
    else:
        y = scaled(x, weight, scale[...])
    update = lora_product(equation, x, module, name)
    return y if update is None else y + update.astype(y.dtype)


def affine(equation: str, x: jax.Array, module: nnx.Module, name: str) -> jax.Array:
    """`product` in the dtype of `x`, with the bias of the matrix if there is one."""
    return biased(product(equation, x, module, name), module, name)


def biased(y: jax.Array, module: nnx.Module, name: str) -> jax.Array:
    """`y`, with the bias of the matrix `name` of `module` if there is one: `name`_bias."""
    bias = getattr(module, f"{name}_bias", None)
    return y if bias is None else y + bias[...].astype(y.dtype)


def _gathered(param: nnx.Param) -> jax.Array:
    """A parameter's value, whole along the model's width, or along the groups of it."""
    whole = ("embed", "embed_groups")
    axes = (None if axis in whole else axis for axis in param.get_metadata("axes"))
    return sharding.constrain(param[...], *axes)


def contract(equation: str, x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """`einsum(equation, x, weight)`, summed over axes in the order in which the weight has them.

    `einsum` sorts them by their letters: H, N for a weight [N, H, D], which XLA then transposes, in
    decoding at every step.

    Args:
        equation: must end with the axes of the weight that are not summed over.
        dtype: of the result; default: that of the factors.
    """
    return jnp.tensordot(x, weight, _summed(equation), preferred_element_type=dtype)


def _summed(equation: str) -> tuple[list[int], list[int]]:
    """The axes of x and of the weight that are summed over, in the order of the weight's."""
    of_x, of_weight = equation.split("->")[0].split(",")
    summed = [axis for axis in of_weight if axis in of_x]
    return [of_x.index(axis) for axis in summed], [of_weight.index(axis) for axis in summed]


def look_up(
    module: nnx.Module, name: str, ids_BT: jax.Array, dtype: jnp.dtype, weight_sharding: str
) -> jax.Array:
    """The rows int32 [B, T] of the table `name` of `module`: [B, T, D] in `dtype`."""
    table_VD, scale = getattr(module, name)[...], getattr(module, name + SCALE, None)
    read = functools.partial(sharding.look_up, ids_BT=ids_BT, weight_sharding=weight_sharding)
    if scale is None:
        return read(table_VD, dtype=dtype)
    scale = scale[...]
    if scale.ndim == 1:
        return (read(table_VD, dtype=dtype) * scale[ids_BT][..., None]).astype(dtype)
    # Rows of other devices are added, which not every backend does in uint8; bfloat16 holds bytes.
    x_BTE = read(table_VD, dtype=jnp.bfloat16).astype(jnp.uint8)
    return unpacked(x_BTE, read(scale, dtype=jnp.float32), axis=2).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product_in_groups(
    equation: str,
    narrow: jnp.dtype,
    dtype: jnp.dtype | None,
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    """The product of `x`, whose dtype is `narrow`, with int4 weights, which have no gradient.

    The backward pass unpacks them again: to `jax.checkpoint` in a loop with a policy of its own,
    the unpacked weights are results like others, and all of them would be stored.
    """
    return contract(equation, x, _unpacked(equation, narrow, packed, scale), dtype)


def _product_in_groups_forward(equation, narrow, dtype, x, packed, scale):
    return _product_in_groups(equation, narrow, dtype, x, packed, scale), (packed, scale)


def _product_in_groups_backward(equation, narrow, dtype, weights, gradient):
    of_weight, result = equation.split(",")[1].split("->")
    kept = [axis for axis in of_weight if axis in result]
    axes = [result.index(axis) for axis in kept], [of_weight.index(axis) for axis in kept]
    weight = _unpacked(equation, narrow, *weights)
    return jnp.tensordot(gradient.astype(narrow), weight, axes), None, None


_product_in_groups.defvjp(_product_in_groups_forward, _product_in_groups_backward)


def _unpacked(equation: str, dtype: jnp.dtype, packed: jax.Array, scale: jax.Array) -> jax.Array:
    return unpacked(packed, scale, max(_summed(equation)[1])).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _wide_product(equation: str, dtype: jnp.dtype, x: jax.Array, weight: jax.Array) -> jax.Array:
    """A product in `dtype` of narrower factors; its gradients are computed in the narrow dtype."""
    return contract(equation, x, weight, dtype)


def _wide_product_forward(equation, dtype, x, weight):
    return _wide_product(equation, dtype, x, weight), (x, weight)


def _wide_product_backward(equation, dtype, factors, gradient):
    _, backward = jax.vjp(functools.partial(contract, equation), *factors)
    return backward(gradient.astype(factors[0].dtype))


_wide_product.defvjp(_wide_product_forward, _wide_product_backward)
