"""Attention kernels for one kind of device: Splash for TPU, cuDNN for NVIDIA GPUs.

Arguments, axes and results are those of `chunked_attention`. If a query sees no key, its result is
meaningless; the caller sets it to zero.
"""

import jax
import jax.numpy as jnp

# Multiples of 128, the width of a TPU's vector registers.
SPLASH_BLOCKS = (512, 256, 128)


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    *,
    scale: float,
    logit_cap: float | None,
    window: int | None,
) -> jax.Array:
    """Splash attention, a Pallas kernel for TPU. T = S, a multiple of 128."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a second

    length, N = q_BTNH.shape[1:3]
    block = next(size for size in SPLASH_BLOCKS if length % size == 0)
    if window is None:
        mask = splash.CausalMask((length, length))
    else:
        mask = splash.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(
            **{f"block_{axis}": block for axis in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")}
        ),
        attn_logits_soft_cap=logit_cap,
        head_shards=1,
        q_seq_shards=1,
    )
    x_BNTH = jax.vmap(kernel)(
        jnp.swapaxes((q_BTNH * scale).astype(q_BTNH.dtype), 1, 2),
        jnp.swapaxes(k_BSKH, 1, 2),
        jnp.swapaxes(v_BSKH, 1, 2),
        splash.SegmentIds(query_segments_BT, key_segments_BS),
    )
    return jnp.swapaxes(x_BNTH, 1, 2)


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    query_order_BT: jax.Array | None = None,
    key_order_BS: jax.Array | None = None,
    *,
    scale: float,
    logit_cap: float | None,
    window: int | None,
) -> jax.Array:
    """cuDNN's flash attention. Each row holds one segment, then padding; there is no logit cap.

    The causal mask alone hides padding, since padding comes last. Orders are given for one query a
    row, whose keys are in the order of the array; there is no window then.
    """
    del query_segments_BT, key_segments_BS, key_order_BS, logit_cap
    if query_order_BT is not None:
        return _cudnn_decode(q_BTNH, k_BSKH, v_BSKH, query_order_BT, scale)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def _cudnn_decode(
    q_B1NH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, order_B1: jax.Array, scale: float
) -> jax.Array:
    """Attention of one query a row to the keys that are not later: [B, 1, N, H].

    Each key head becomes a row of its own: caches hold [B, K, S, H], so nothing is copied.
    """
    B, _, N, H = q_B1NH.shape
    S, K = k_BSKH.shape[1:3]
    q_X1GH = q_B1NH.reshape(B * K, 1, N // K, H)
    k_XS1H, v_XS1H = (jnp.swapaxes(x, 1, 2).reshape(B * K, S, 1, H) for x in (k_BSKH, v_BSKH))
    x_X1GH = jax.nn.dot_product_attention(
        q_X1GH,
        k_XS1H,
        v_XS1H,
        scale=scale,
        query_seq_lengths=jnp.ones(B * K, jnp.int32),
        key_value_seq_lengths=jnp.repeat(order_B1[:, 0] + 1, K),
        implementation="cudnn",
    )
    return x_X1GH.reshape(B, 1, N, H)
