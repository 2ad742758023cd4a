"""Products with weights that are float or int8, with or without a LoRA update.

Axes: B batch, T position, D model width, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax import sharding
from calm_jax.models.lora import lora_product
from calm_jax.models.quantized import SCALE


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

    y = multiply(x, weight) if scale is None else scaled(x, weight, scale[...])
    update = lora_product(equation, x, module, name)
    return y if update is None else y + update.astype(y.dtype)


def contract(equation: str, x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """`einsum(equation, x, weight)`, summed over axes in the order in which the weight has them.

    `einsum` sorts them by their letters: H, N for a weight [N, H, D], which XLA then transposes, in
    decoding at every step.

    Args:
        equation: must end with the axes of the weight that are not summed over.
        dtype: of the result; default: that of the factors.
    """
    of_x, of_weight = equation.split("->")[0].split(",")
    summed = [axis for axis in of_weight if axis in of_x]
    axes = tuple([names.index(axis) for axis in summed] for names in (of_x, of_weight))
    return jnp.tensordot(x, weight, axes, preferred_element_type=dtype)


def look_up(
    module: nnx.Module, name: str, ids_BT: jax.Array, dtype: jnp.dtype, weight_sharding: str
) -> jax.Array:
    """The rows int32 [B, T] of the table `name` of `module`: [B, T, D] in `dtype`."""
    scale_V = getattr(module, name + SCALE, None)
    x_BTD = sharding.look_up(getattr(module, name)[...], ids_BT, weight_sharding, dtype)
    return x_BTD if scale_V is None else (x_BTD * scale_V[...][ids_BT][..., None]).astype(dtype)


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
