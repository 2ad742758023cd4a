"""Products with weights that are float or int8, with or without a LoRA update.

Axes: B batch, T position, D model width, V vocabulary.
"""

import functools

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
            return jnp.einsum(equation, x, weight)
        return _wide_product(equation, dtype, x, weight)

    # Recomputed in the backward pass: a scan over layers would store all weights cast to float.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def scaled(x, weight, scale):
        y = multiply(x, weight)
        return (y * scale).astype(y.dtype)

    y = multiply(x, weight) if scale is None else scaled(x, weight, scale[...])
    update = lora_product(equation, x, module, name)
    return y if update is None else y + update.astype(y.dtype)


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
    return jnp.einsum(equation, x, weight, preferred_element_type=dtype)


def _wide_product_forward(equation, dtype, x, weight):
    return _wide_product(equation, dtype, x, weight), (x, weight)


def _wide_product_backward(equation, dtype, factors, gradient):
    _, backward = jax.vjp(functools.partial(jnp.einsum, equation), *factors)
    return backward(gradient.astype(factors[0].dtype))


_wide_product.defvjp(_wide_product_forward, _wide_product_backward)
