"""Exact attention in blocks with an online softmax (FlashAttention-2, arXiv 2307.08691).

It is plain JAX for any device. At most one block of logits exists at a time. The backward pass
recomputes the logits from the inputs and each query's log of the softmax denominator. Blocks
without a visible key, in the future or before every window, are skipped while tracing.

Axes: B batch, T query position in its block, S key position in its block, I query blocks, J key
blocks, N heads, K key heads, G queries of each key head (N = K·G), H head width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

# Most positions of a block. The logits of one block are float32 [B, N, BLOCK, BLOCK].
BLOCK = 512

# Finite: neither a row of masked logits nor the difference of two may become NaN.
MASKED_LOGIT = -0.7 * float(jnp.finfo(jnp.float32).max)


def chunked_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    query_order_BT: jax.Array | None = None,
    key_order_BS: jax.Array | None = None,
    *,
    scale: float,
    logit_cap: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """Attention as `calm_jax.models.attention` defines it.

    Args:
        q_BTNH, k_BSKH, v_BSKH: queries [B, T, N, H], keys and values [B, S, K, H].
        query_segments_BT, key_segments_BS: int32 [B, T] and [B, S].
        query_order_BT, key_order_BS: int32 [B, T] and [B, S], both or neither; default: the
            positions in the arrays, with which blocks can be skipped.

    Returns:
        [B, T, N, H] in the dtype of `v_BSKH`; exactly 0 where a query sees no key.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    queries, keys = _Blocks.of(T), _Blocks.of(k_BSKH.shape[1])

    def cut(x, blocks, *rest):
        """[B, T, ...] as [blocks, B, size, ...], padded with zeros: padding has segment 0."""
        added = blocks.number * blocks.size - x.shape[1]
        x = jnp.pad(x, [(0, 0), (0, added)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, blocks.number, blocks.size, *rest), 1, 0)

    ordered = query_order_BT is not None
    x_IBKGTH = _attend(
        _Walk(queries, keys, ordered, scale, logit_cap, window),
        jnp.einsum("IBTKGH->IBKGTH", cut(q_BTNH, queries, K, N // K, H)),
        jnp.einsum("JBSKH->JBKSH", cut(k_BSKH, keys, K, H)),
        jnp.einsum("JBSKH->JBKSH", cut(v_BSKH, keys, K, H)),
        (cut(query_segments_BT, queries), cut(query_order_BT, queries) if ordered else None),
        (cut(key_segments_BS, keys), cut(key_order_BS, keys) if ordered else None),
    )
    x_BITKGH = jnp.einsum("IBKGTH->BITKGH", x_IBKGTH)
    return x_BITKGH.reshape(B, queries.number * queries.size, N, H)[:, :T]


@dataclasses.dataclass(frozen=True)
class _Blocks:
    number: int
    size: int

    @classmethod
    def of(cls, length: int) -> "_Blocks":
        number = -(-length // BLOCK)
        return cls(number, -(-length // number))


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The pairs of query and key blocks, and the logits and mask of each pair."""

    queries: _Blocks
    keys: _Blocks
    ordered: bool  # whether explicit orders are given
    scale: float
    logit_cap: float | None
    window: int | None

    def pairs(self) -> np.ndarray:
        """int32 [pairs, 2]: every query block with each key block that one of its queries sees."""

        def meet(i: int, j: int) -> bool:
            if self.ordered:
                return True
            nearest = i * self.queries.size - ((j + 1) * self.keys.size - 1)
            last = (i + 1) * self.queries.size - 1 - j * self.keys.size
            return last >= 0 and (self.window is None or nearest < self.window)

        pairs = np.ndindex(self.queries.number, self.keys.number)
        return np.array([(i, j) for i, j in pairs if meet(i, j)], np.int32)

    def logits(self, q_BKGTH, k_BKSH) -> jax.Array:
        """Capped logits of one pair, float32 [B, K, G, T, S]."""
        logits_BKGTS = self.scale * jnp.einsum(
            "BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32
        )
        if self.logit_cap is None:
            return logits_BKGTS
        return self.logit_cap * jnp.tanh(logits_BKGTS / self.logit_cap)

    def mask(self, i, j, queries, keys) -> jax.Array:
        """Bool [B, 1, 1, T, S]: whether queries of block i see keys of block j."""
        (segments_IBT, order_IBT), (segments_JBS, order_JBS) = queries, keys
        queries_BT, keys_BS = segments_IBT[i], segments_JBS[j]
        if self.ordered:
            distance = order_IBT[i][:, :, None] - order_JBS[j][:, None, :]
        else:
            query_T = i * self.queries.size + jnp.arange(self.queries.size)
            key_S = j * self.keys.size + jnp.arange(self.keys.size)
            distance = query_T[:, None] - key_S[None, :]
        near = distance >= 0
        if self.window is not None:
            near &= distance < self.window
        same_BTS = queries_BT[:, :, None] == keys_BS[:, None, :]
        return (near & same_BTS & (keys_BS != 0)[:, None, :])[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(walk: _Walk, q_IBKGTH, k_JBKSH, v_JBKSH, queries, keys):
    return _forward(walk, q_IBKGTH, k_JBKSH, v_JBKSH, queries, keys)[0]


def _forward(walk: _Walk, q_IBKGTH, k_JBKSH, v_JBKSH, queries, keys):
    """The result, and the residuals of the backward pass."""

    def step(carry, pair):
        values_IBKGTH, sums_IBKGT, maxima_IBKGT = carry
        i, j = pair
        mask = walk.mask(i, j, queries, keys)
        logits = jnp.where(mask, walk.logits(q_IBKGTH[i], k_JBKSH[j]), MASKED_LOGIT)
        maxima = jnp.maximum(maxima_IBKGT[i], jnp.max(logits, axis=-1))
        weights = jnp.where(mask, jnp.exp(logits - maxima[..., None]), 0.0)
        kept = jnp.exp(maxima_IBKGT[i] - maxima)
        values = jnp.einsum(
            "BKGTS,BKSH->BKGTH", weights.astype(v_JBKSH.dtype), v_JBKSH[j],
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        carry = (
            _put(values_IBKGTH, i, kept[..., None] * values_IBKGTH[i] + values),
            _put(sums_IBKGT, i, kept * sums_IBKGT[i] + jnp.sum(weights, axis=-1)),
            _put(maxima_IBKGT, i, maxima),
        )
        return carry, None

    rows = q_IBKGTH.shape[:-1]
    start = (
        jnp.zeros(q_IBKGTH.shape, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.full(rows, MASKED_LOGIT, jnp.float32),
    )
    values_IBKGTH, sums_IBKGT, maxima_IBKGT = _in_one_piece(
        lambda start: jax.lax.scan(step, start, walk.pairs())[0], start
    )
    sums_IBKGT = jnp.where(sums_IBKGT == 0, 1.0, sums_IBKGT)  # a query that sees nothing
    x_IBKGTH = values_IBKGTH / sums_IBKGT[..., None]
    log_sums_IBKGT = maxima_IBKGT + jnp.log(sums_IBKGT)
    kept = (q_IBKGTH, k_JBKSH, v_JBKSH, queries, keys, x_IBKGTH, log_sums_IBKGT)
    return x_IBKGTH.astype(v_JBKSH.dtype), kept


def _backward(walk: _Walk, kept, dx_IBKGTH):
    q_IBKGTH, k_JBKSH, v_JBKSH, queries, keys, x_IBKGTH, log_sums_IBKGT = kept
    # The term of the softmax gradient that all keys of a query share. It stays float32: rounding to
    # bfloat16 would double the error of the gradients.
    shared_IBKGT = jnp.sum(dx_IBKGTH.astype(jnp.float32) * x_IBKGTH, axis=-1)

    def step(carry, pair):
        dq_IBKGTH, dk_JBKSH, dv_JBKSH = carry
        i, j = pair
        q, k, v, dx = q_IBKGTH[i], k_JBKSH[j], v_JBKSH[j], dx_IBKGTH[i]
        mask = walk.mask(i, j, queries, keys)
        logits = walk.logits(q, k)
        weights = jnp.where(mask, jnp.exp(logits - log_sums_IBKGT[i][..., None]), 0.0)
        dweights = jnp.einsum("BKGTH,BKSH->BKGTS", dx, v, preferred_element_type=jnp.float32)
        dlogits = weights * (dweights - shared_IBKGT[i][..., None])
        if walk.logit_cap is not None:
            dlogits *= 1 - jnp.square(logits / walk.logit_cap)
        dlogits = (walk.scale * dlogits).astype(q.dtype)
        add = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dq = add("BKGTS,BKSH->BKGTH", dlogits, k)
        dk = add("BKGTS,BKGTH->BKSH", dlogits, q)
        dv = add("BKGTS,BKGTH->BKSH", weights.astype(v.dtype), dx)
        carry = (
            _put(dq_IBKGTH, i, dq_IBKGTH[i] + dq),
            _put(dk_JBKSH, j, dk_JBKSH[j] + dk),
            _put(dv_JBKSH, j, dv_JBKSH[j] + dv),
        )
        return carry, None

    inputs = (q_IBKGTH, k_JBKSH, v_JBKSH)
    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in inputs)
    gradients, _ = jax.lax.scan(step, start, walk.pairs())
    gradients = [dx.astype(x.dtype) for dx, x in zip(gradients, inputs, strict=True)]
    return (*gradients, None, None)


_attend.defvjp(_forward, _backward)


def _in_one_piece(function, x):
    """`function(x)` inside a loop of one iteration, which partial evaluation does not enter.

    Partial evaluation would split a bare scan, and under some rematerialisation policies save the
    masks and logits of all its steps.
    """
    return jax.lax.while_loop(lambda x: x[0] < 1, lambda x: (x[0] + 1, function(x[1])), (0, x))[1]


def _put(x, index, value):
    """`x.at[index].set(value)` as an in-place update instead of a scatter."""
    return jax.lax.dynamic_update_index_in_dim(x, value, index, 0)
