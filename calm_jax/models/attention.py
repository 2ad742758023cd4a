"""Dot-product attention: what a token may see, and by which backend it is computed.

Query t sees key s iff s <= t by index, their segments are equal and not 0, and, in a local layer,
t - s < window. A query that sees nothing gets exactly zero: a softmax over it would be a mean.

Axes: B batch, T query position, S key position, D model width, N heads, K key heads, G queries a
key head (N = K·G), H head width.
"""

import functools

import jax
import jax.numpy as jnp

from calm_jax import sharding
from calm_jax.models.attention_kernels import cudnn_attention, splash_attention
from calm_jax.models.chunked_attention import chunked_attention
from calm_jax.models.config import DecoderConfig
from calm_jax.models.execution import Execution
from calm_jax.models.rotary import apply_rope, rope_angles, xpos_scale

# Finite, so that a row with nothing to see has no NaN before it is set to zero.
MASKED_LOGIT = -0.7 * float(jnp.finfo(jnp.float32).max)

# Backends that never hold the square of queries by keys; each computes one device's rows and heads.
_WITHOUT_WEIGHTS = {
    "chunked": chunked_attention,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
}


class Attention:
    """Attention of one forward pass by one backend: what all of its layers share.

    Args:
        backend: "xla", "chunked", "splash" or "cudnn" (`calm_jax.models.attention_choice`).
        query_segments_BT: int32, 0 is padding.
        key_segments_BS: int32, 0 is seen by nobody; default: those of the queries.
        scale: factor on the logits, before `logit_cap` * tanh(logits / `logit_cap`).
        window: tokens that a local layer sees, the query's own included. One that no row is longer
            than hides nothing: then all layers are computed alike.
    """

    def __init__(
        self,
        backend: str,
        query_segments_BT: jax.Array,
        key_segments_BS: jax.Array | None = None,
        *,
        scale: float,
        logit_cap: float | None = None,
        window: int | None = None,
    ):
        self.backend, self.scale, self.logit_cap = backend, scale, logit_cap
        if window is not None and window >= query_segments_BT.shape[1]:
            window = None
        self.window = window
        own_keys = key_segments_BS is None
        self.segments = (query_segments_BT, query_segments_BT if own_keys else key_segments_BS)
        if backend == "xla":
            self.mask_BTS = causal_mask(*self.segments)
            self.sees_any_BT = jnp.any(self.mask_BTS, axis=-1)
            if window is not None:
                self.local_mask_BTS = self.mask_BTS & window_mask(self.mask_BTS.shape[1], window)
        elif own_keys:
            self.sees_any_BT = query_segments_BT != 0
        else:
            # What attention makes of ones: 0 of none.
            ones_BS11 = jnp.ones((*key_segments_BS.shape, 1, 1))
            x_BT11 = chunked_attention(ones_BS11, ones_BS11, ones_BS11, *self.segments, scale=1.0)
            self.sees_any_BT = x_BT11[:, :, 0, 0] != 0

    def __call__(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        local: jax.Array | None = None,
    ) -> jax.Array:
        """Values [B, T, N, H] in the dtype of `v_BSKH`.

        `local`: whether this layer sees its window only; a bool scalar, traced inside a scan.
        """
        if self.backend == "xla":
            return self.with_weights(q_BTNH, k_BSKH, v_BSKH, local)[0]
        if self.window is None:
            x_BTNH = self._split(None, q_BTNH, k_BSKH, v_BSKH)
        else:
            branches = (functools.partial(self._split, window) for window in (self.window, None))
            x_BTNH = jax.lax.cond(local, *branches, q_BTNH, k_BSKH, v_BSKH)
        return jnp.where(self.sees_any_BT[:, :, None, None], x_BTNH, 0)

    def with_weights(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        local: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The values, and the weights float32 [B, N, T, S]; of the backend "xla" alone."""
        mask_BTS = self.mask_BTS
        if self.window is not None:
            mask_BTS = jnp.where(local, self.local_mask_BTS, mask_BTS)
        return dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=self.scale, logit_cap=self.logit_cap
        )

    def _split(self, window: int | None, q_BTNH, k_BSKH, v_BSKH) -> jax.Array:
        """Every device attends for its own rows and heads."""
        attend = functools.partial(
            _WITHOUT_WEIGHTS[self.backend],
            scale=self.scale,
            logit_cap=self.logit_cap,
            window=window,
        )
        N, K = q_BTNH.shape[2], k_BSKH.shape[2]

        def on_device(q_BTNH, k_BSKH, v_BSKH, queries_BT, keys_BS, head_N):
            own = q_BTNH.shape[2]
            if own * K != N * k_BSKH.shape[2]:
                # Key heads are not split as queries are: every device holds all, and takes its own.
                key_head_N = head_N // (N // K)
                if (N // K) % own == 0:
                    key_head_N = key_head_N[:1]
                k_BSKH, v_BSKH = (jnp.take(x, key_head_N, axis=2) for x in (k_BSKH, v_BSKH))
            return attend(q_BTNH, k_BSKH, v_BSKH, queries_BT, keys_BS)

        keys, segments = ("batch", "length", "kv_heads", "head_dim"), ("batch", "length")
        return sharding.on_each_device(
            on_device,
            (q_BTNH, k_BSKH, v_BSKH, *self.segments, jnp.arange(N)),
            (("batch", "length", "heads", "head_dim"), keys, keys, segments, segments, ("heads",)),
        )


class SelfAttentionInputs:
    """What every layer of one forward pass shares: attention, and rotary angles of both kinds."""

    def __init__(
        self,
        config: DecoderConfig,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        execution: Execution,
    ):
        self.config = config
        self.execution = execution
        self.attend = Attention(
            execution.attention,
            segment_ids_BT,
            scale=config.scale,
            logit_cap=config.attention_logit_cap,
            window=config.window if any(config.local_layers) else None,
        )
        rotated = config.head_dim if config.rope_dim is None else config.rope_dim
        if config.rope:
            self.angles = rope_angles(positions_BT, rotated, config.rope_base, config.rope_scaling)
            if any(config.local_layers) and config.local_rope_base is not None:
                self.local_angles = rope_angles(positions_BT, rotated, config.local_rope_base)
        if config.xpos_scale_base is not None:
            self.xpos = xpos_scale(positions_BT, config.head_dim, config.xpos_scale_base)

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


def causal_mask(query_segments_BT: jax.Array, key_segments_BS: jax.Array) -> jax.Array:
    """Bool [B, T, S]: query t sees key s iff s <= t by index and their segment is one, not 0."""
    length = query_segments_BT.shape[1]
    past_TS = jnp.tril(jnp.ones((length, length), bool))
    same_BTS = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    return past_TS & same_BTS & (key_segments_BS != 0)[:, None, :]


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
    """Attention with grouped queries over the whole square; softmax in float32.

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
