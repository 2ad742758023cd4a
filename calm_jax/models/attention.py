"""Masks, rotary positions and dot-product attention, shared by decoders and bridges.

Axes: B batch, T query position, S key position, D model width, N heads, K key heads, G queries a
key head (N = K·G), H head width.
"""

import math

import jax
import jax.numpy as jnp

from calm_jax.models.config import DecoderConfig, RopeScaling
from calm_jax.models.execution import Execution

# Finite, so that a row with nothing to see has no NaN before it is set to zero.
MASKED_LOGIT = -0.7 * float(jnp.finfo(jnp.float32).max)


def causal_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """Bool [B, T, S]: query t sees key s iff s <= t by index and their segment is one, not 0."""
    length = segment_ids_BT.shape[1]
    past_TS = jnp.tril(jnp.ones((length, length), bool))
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return past_TS & same_BTS & (segment_ids_BT != 0)[:, None, :]


def window_mask(length: int, window: int) -> jax.Array:
    """Bool [T, S]: key s is one of the `window` tokens that end at t."""
    distance_TS = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    return distance_TS < window


def dot_product_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    *,
    scale: float,
    logit_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention with grouped queries; softmax in float32.

    A query that may see nothing gets exactly zero (a softmax over nothing would be a mean).

    Returns:
        values [B, T, N, H] in the dtype of `v_BSKH`, and the weights, float32 [B, N, T, S].
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logits_BKGTS = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    if logit_cap is not None:
        logits_BKGTS = logit_cap * jnp.tanh(logits_BKGTS / logit_cap)
    mask_B11TS = mask_BTS[:, None, None]
    weights_BKGTS = jax.nn.softmax(jnp.where(mask_B11TS, logits_BKGTS, MASKED_LOGIT), axis=-1)
    weights_BKGTS = jnp.where(mask_B11TS, weights_BKGTS, 0.0)
    x_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return x_BTKGH.reshape(B, T, N, H), weights_BKGTS.reshape(B, N, T, -1)


def rope_frequencies(dim: int, base: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Radians a token, float32 [dim / 2]."""
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
    """Angles of rotary positions, float32 [B, T, dim / 2]."""
    frequencies = rope_frequencies(dim, base, scaling)
    return positions_BT[..., None].astype(jnp.float32) * frequencies


def apply_rope(x_BTNH: jax.Array, angles_BTR: jax.Array, style: str) -> jax.Array:
    """Rotates the first 2R features of each head (arXiv 2104.09864); the others pass unchanged.

    style "half" pairs feature r with r + R; "interleaved" pairs 2r with 2r + 1.
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
    """Decay of xPos (arXiv 2212.10554), float32 [B, T, 1, dim], on queries; on keys its inverse."""
    decay = (jnp.arange(0, dim, 2, dtype=jnp.float32) + 0.4 * dim) / (1.4 * dim)
    # Only differences of positions matter; centring keeps both factors near one.
    power = (positions_BT - positions_BT.shape[1] // 2) / scale_base
    scale_BTR = decay ** power[..., None]
    return jnp.concatenate([scale_BTR, scale_BTR], axis=-1)[:, :, None]


class SelfAttentionInputs:
    """What every layer of one forward pass shares: masks and rotary angles, local and global."""

    def __init__(
        self,
        config: DecoderConfig,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        execution: Execution,
    ):
        self.config = config
        self.execution = execution
        self.mask_BTS = causal_mask(segment_ids_BT)
        rotated = config.head_dim if config.rope_dim is None else config.rope_dim
        if config.rope:
            self.angles = rope_angles(positions_BT, rotated, config.rope_base, config.rope_scaling)
        if any(config.local_layers):
            self.local_mask_BTS = self.mask_BTS & window_mask(positions_BT.shape[1], config.window)
            if config.rope and config.local_rope_base is not None:
                self.local_angles = rope_angles(positions_BT, rotated, config.local_rope_base)
        if config.xpos_scale_base is not None:
            self.xpos = xpos_scale(positions_BT, config.head_dim, config.xpos_scale_base)

    def mask(self, local: jax.Array) -> jax.Array:
        """Bool [B, T, S] for a layer; `local` is a bool scalar, traced inside a scan."""
        if not any(self.config.local_layers):
            return self.mask_BTS
        return jnp.where(local, self.local_mask_BTS, self.mask_BTS)

    def rotate(self, q_BTNH: jax.Array, k_BSKH: jax.Array, local: jax.Array):
        """Queries and keys with their positions in them."""
        if self.config.rope:
            angles = self.angles
            if hasattr(self, "local_angles"):
                angles = jnp.where(local, self.local_angles, angles)
            q_BTNH = apply_rope(q_BTNH, angles, self.config.rope)
            k_BSKH = apply_rope(k_BSKH, angles, self.config.rope)
        if self.config.xpos_scale_base is not None:
            q_BTNH = (q_BTNH * self.xpos).astype(q_BTNH.dtype)
            k_BSKH = (k_BSKH / self.xpos).astype(k_BSKH.dtype)
        return q_BTNH, k_BSKH
