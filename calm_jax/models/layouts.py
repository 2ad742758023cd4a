"""How activations are sharded between the parts of a layer.

Axes: B batch, T position, D model width, N heads, H head width, E augment width.
"""

import jax

from calm_jax import sharding


def residual_layout(x_BTD: jax.Array) -> jax.Array:
    """Shards [B, T, D] as the residual stream: along its length too."""
    return sharding.constrain(x_BTD, "batch", "stream_length", "activation_embed")


@jax.custom_vjp
def whole_length(x_BTD: jax.Array) -> jax.Array:
    """Gathers the length of [B, T, D], for products whose results are split by heads or features.

    Their gradient is a partial sum on each device, so it is sharded as the residual stream.
    """
    return sharding.constrain(x_BTD, "batch", "length", "activation_embed")


whole_length.defvjp(
    lambda x_BTD: (whole_length(x_BTD), None), lambda _, gradient: (residual_layout(gradient),)
)


def split_by_width(x_BTNE: jax.Array) -> jax.Array:
    """Shards queries of latents, [B, T, N, E], by the width of the augment, as latents are.

    Each device then reads only its part of the latents, and logits are summed over devices. If
    queries were split by heads, every device would read and keep whole latents.
    """
    return sharding.constrain(x_BTNE, "batch", "length", None, "augment_embed")


def split_by_heads(x_BTNH: jax.Array, heads: str = "heads") -> jax.Array:
    """Shards queries, keys or values [B, T, N, H], and so their gradients, by heads."""
    return sharding.constrain(x_BTNH, "batch", "length", heads, "head_dim")
