"""Rotary positions, and the xPos decay.

Axes: B batch, T position, N heads, H head width, R pairs of rotated features.
"""

import math

import jax
import jax.numpy as jnp

from calm_jax.models.config import RopeScaling


def rope_frequencies(dim: int, base: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Radians per token, float32 [dim / 2]."""
    frequencies = base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    smooth = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rope_angles(
    positions_BT: jax.Array, dim: int, base: float, scaling: RopeScaling | None = None
) -> jax.Array:
    """Angles of the positions int32 [B, T], float32 [B, T, dim / 2]."""
    frequencies = rope_frequencies(dim, base, scaling)
    return positions_BT[..., None].astype(jnp.float32) * frequencies


def apply_rope(x_BTNH: jax.Array, angles_BTR: jax.Array, style: str) -> jax.Array:
    """Rotates the first 2R features of each head (arXiv 2104.09864).

    Args:
        x_BTNH: [B, T, N, H]; the result has its shape and dtype.
        angles_BTR: float32 [B, T, R].
        style: "half" pairs feature r with r + R; "interleaved" pairs 2r with 2r + 1.
    """
    pairs = angles_BTR.shape[-1]
    rotated, kept = x_BTNH[..., : 2 * pairs].astype(jnp.float32), x_BTNH[..., 2 * pairs :]
    sin, cos = jnp.sin(angles_BTR)[:, :, None], jnp.cos(angles_BTR)[:, :, None]
    if style == "half":
        first, second = jnp.split(rotated, 2, axis=-1)
    else:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    turned = (first * cos - second * sin, second * cos + first * sin)
    if style == "half":
        rotated = jnp.concatenate(turned, axis=-1)
    else:
        rotated = jnp.stack(turned, axis=-1).reshape(rotated.shape)
    return jnp.concatenate([rotated.astype(x_BTNH.dtype), kept], axis=-1)


def xpos_scale(positions_BT: jax.Array, dim: int, scale_base: float) -> jax.Array:
    """The xPos decay (arXiv 2212.10554), float32 [B, T, 1, dim]: multiplies queries, divides keys.

    It neither overflows nor underflows for positions, int32 [B, T], up to 65 times `scale_base`.
    """
    decay = (jnp.arange(0, dim, 2, dtype=jnp.float32) + 0.4 * dim) / (1.4 * dim)
    scale_BTR = decay ** (positions_BT / scale_base)[..., None]
    return jnp.concatenate([scale_BTR, scale_BTR], axis=-1)[:, :, None]
