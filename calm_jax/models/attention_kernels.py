"""Attention kernels for one kind of device: Splash for TPU, cuDNN for NVIDIA GPUs.

Arguments, axes and results are those of `chunked_attention`, without orders. If a query sees no
key, its result is finite but meaningless; the caller sets it to zero.
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
    *,
    scale: float,
    logit_cap: float | None,
    window: int | None,
) -> jax.Array:
    """cuDNN's flash attention. Each row holds one segment, then padding; there is no logit cap.

    The causal mask alone hides padding, since padding comes last.
    """
    del query_segments_BT, key_segments_BS, logit_cap
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
