"""Dot-product attention: which keys a query sees, and which backend computes it.

Query t sees key s if s comes no later than t, both have the same segment, that segment is not 0
(padding) and, in a local layer, s is less than one window back. "Later" follows the positions in
the array, or the explicit order of the inputs. The result for a query that sees no key is exactly
zero, where a softmax would return the mean of all values.

Axes: B batch, T query position, S key position, D model width, N heads, K key heads, G queries of
each key head (N = K·G), H head width.
"""

import functools

import jax
import jax.numpy as jnp

from calm_jax import sharding
from calm_jax.models.attention_choice import is_one_of_many
from calm_jax.models.attention_kernels import SPLASH_BLOCKS, cudnn_attention, splash_attention
from calm_jax.models.chunked_attention import MASKED_LOGIT, chunked_attention
from calm_jax.models.inputs import Inputs

# A CPU computes the queries of a row one by one if there are at most FEW of them, one for each key
# head, and at least MANY rows times heads: measured, and twice as fast with 1,000 keys.
FEW, MANY = 8, 64

# Kernels for one kind of device.
_KERNELS = ("splash", "cudnn")

# Backends that never hold the full T x S logits. Each computes the rows and heads of one device.
_WITHOUT_WEIGHTS = {
    "chunked": chunked_attention,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
}


class Attention:
    """Backend, masks and scale, which all layers share in one forward pass.

    Args:
        backend: one of `calm_jax.models.attention_choice.BACKENDS`. "splash" and "cudnn" support
            only the order of the array and T = S, "splash" only whole blocks of tokens, "cudnn"
            also one query of a row that is not packed; "chunked" replaces them for other inputs.
        queries: `filled` inputs [B, T].
        keys: inputs [B, S] with segments; default: the queries.
        scale: factor on the logits, before `logit_cap` * tanh(logits / `logit_cap`).
        window: number of tokens that a local layer sees, the query itself included.
    """

    def __init__(
        self,
        backend: str,
        queries: Inputs,
        keys: Inputs | None = None,
        *,
        scale: float,
        logit_cap: float | None = None,
        window: int | None = None,
    ):
        keys = queries if keys is None else keys
        length = keys.shape[1]
        # A window as long as the rows hides nothing, so local layers are global ones.
        if queries.order_BT is None and keys.order_BT is None:
            self.orders = ()
            if window is not None and window >= max(queries.shape[1], length):
                window = None
        else:
            self.orders = (_order(queries), _order(keys))
        decodes = backend == "cudnn" and window is None and is_one_of_many(queries, keys)
        fits = not self.orders and queries.shape[1] == length
        fits &= backend != "splash" or length % min(SPLASH_BLOCKS) == 0
        if backend in _KERNELS and not (decodes or fits):
            backend = "chunked"
        self.backend, self.scale, self.logit_cap, self.window = backend, scale, logit_cap, window
        self.segments = (queries.segments_BT, keys.segments_BT)
        if backend == "xla":
            in_array = [jnp.arange(x.shape[1])[None] for x in self.segments]
            order_BT, order_BS = self.orders or in_array
            self.mask_BTS = causal_mask(*self.segments, order_BT, order_BS)
            self.sees_any_BT = jnp.any(self.mask_BTS, axis=-1)
            if window is not None:
                near_BTS = order_BT[:, :, None] - order_BS[:, None, :] < window
                self.local_mask_BTS = self.mask_BTS & near_BTS
        elif keys is queries or decodes:
            self.sees_any_BT = queries.segments_BT != 0
        else:
            # Attention over values of 1 is 1 where a query sees a key, and 0 where it sees none.
            ones = [jnp.ones((*x_BT.shape, 1, 1)) for x_BT in self.segments]
            x_BT11 = chunked_attention(*ones, ones[1], *self.segments, *self.orders, scale=1.0)
            self.sees_any_BT = x_BT11[:, :, 0, 0] != 0

    def __call__(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        local: jax.Array | None = None,
    ) -> jax.Array:
        """As `with_weights`, which are not returned."""
        return self.with_weights(q_BTNH, k_BSKH, v_BSKH, local)[0]

    def with_weights(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        local: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Attends with queries [B, T, N, H] to keys and values [B, S, K, H].

        Args:
            local: whether the layer sees only its window; a bool scalar, traced inside a scan.

        Returns:
            [B, T, N, H] in the dtype of `v_BSKH`; and the attention weights, float32 [B, N, T, S],
            or None if the backend is not "xla".
        """
        if self.backend == "xla":
            mask_BTS = self.mask_BTS
            if self.window is not None:
                mask_BTS = jnp.where(local, self.local_mask_BTS, mask_BTS)
            return dot_product_attention(
                q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=self.scale, logit_cap=self.logit_cap
            )
        if self.window is None:
            x_BTNH = self._per_device(None, q_BTNH, k_BSKH, v_BSKH)
        else:
            branches = (functools.partial(self._per_device, w) for w in (self.window, None))
            x_BTNH = jax.lax.cond(local, *branches, q_BTNH, k_BSKH, v_BSKH)
        return jnp.where(self.sees_any_BT[:, :, None, None], x_BTNH, 0), None

    def _per_device(self, window: int | None, q_BTNH, k_BSKH, v_BSKH) -> jax.Array:
        """Runs the backend on each device for its own rows and heads."""
        attend = functools.partial(
            _WITHOUT_WEIGHTS[self.backend],
            scale=self.scale,
            logit_cap=self.logit_cap,
            window=window,
        )
        N, K = q_BTNH.shape[2], k_BSKH.shape[2]

        def on_device(q_BTNH, k_BSKH, v_BSKH, head_N, *rows):
            own = q_BTNH.shape[2]
            if own * K != N * k_BSKH.shape[2]:
                # Key heads are not split: every device holds all of them and picks those it needs.
                key_head_N = head_N // (N // K)
                if (N // K) % own == 0:
                    key_head_N = key_head_N[:1]
                k_BSKH, v_BSKH = (jnp.take(x, key_head_N, axis=2) for x in (k_BSKH, v_BSKH))
            return attend(q_BTNH, k_BSKH, v_BSKH, *rows)

        rows = (*self.segments, *self.orders)
        keys = ("batch", "length", "kv_heads", "head_dim")
        return sharding.on_each_device(
            on_device,
            (q_BTNH, k_BSKH, v_BSKH, jnp.arange(N), *rows),
            (
                ("batch", "length", "heads", "head_dim"),
                keys,
                keys,
                ("heads",),
                *[("batch", "length")] * len(rows),
            ),
        )


def _order(inputs: Inputs) -> jax.Array:
    """The order of the inputs, int32 [B, T]; by default the positions in the array."""
    if inputs.order_BT is not None:
        return inputs.order_BT
    return jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)


def causal_mask(
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    query_order_BT: jax.Array,
    key_order_BS: jax.Array,
) -> jax.Array:
    """Bool [B, T, S]: whether query t sees key s if there are no windows."""
    same_BTS = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    real_B1S = (key_segments_BS != 0)[:, None, :]
    return (query_order_BT[:, :, None] >= key_order_BS[:, None, :]) & same_BTS & real_B1S


def dot_product_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    *,
    scale: float,
    logit_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention that holds all T x S logits; the softmax is in float32.

    Args:
        q_BTNH, k_BSKH, v_BSKH: queries [B, T, N, H], keys and values [B, S, K, H].
        mask_BTS: bool [B, T, S], True where a query sees a key.

    Returns:
        [B, T, N, H] in the dtype of `v_BSKH`, and the weights, float32 [B, N, T, S].
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    attend = functools.partial(_attend, scale=scale, logit_cap=logit_cap)
    arguments = (q_BTKGH, k_BSKH, v_BSKH, mask_BTS)
    if N == K and 1 < T <= FEW and B * K >= MANY:
        x_BTKGH, weights_BKGTS = jax.lax.platform_dependent(
            *arguments, cpu=functools.partial(_one_by_one, attend), default=attend
        )
    else:
        x_BTKGH, weights_BKGTS = attend(*arguments)
    return x_BTKGH.reshape(B, T, N, H), weights_BKGTS.reshape(B, N, T, -1)


def _attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    *,
    scale: float,
    logit_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The sums of values [B, T, K, G, H] and the weights [B, K, G, T, S]."""
    logits_BKGTS = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    if logit_cap is not None:
        logits_BKGTS = logit_cap * jnp.tanh(logits_BKGTS / logit_cap)
    mask_B11TS = mask_BTS[:, None, None]
    weights_BKGTS = jax.nn.softmax(jnp.where(mask_B11TS, logits_BKGTS, MASKED_LOGIT), axis=-1)
    weights_BKGTS = jnp.where(mask_B11TS, weights_BKGTS, 0.0)
    # In this order of axes XLA's CPU backend needs no transposed copy of the values.
    x_BKGTH = jnp.einsum("BKGTS,BSKH->BKGTH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return jnp.einsum("BKGTH->BTKGH", x_BKGTH), weights_BKGTS


def _one_by_one(attend, q_BTKGH, k_BSKH, v_BSKH, mask_BTS) -> tuple[jax.Array, jax.Array]:
    """`attend` for each position by itself."""
    each = [
        attend(q_BTKGH[:, t : t + 1], k_BSKH, v_BSKH, mask_BTS[:, t : t + 1])
        for t in range(mask_BTS.shape[1])
    ]
    x_BTKGH, weights_BKGTS = zip(*each, strict=True)
    return jnp.concatenate(x_BTKGH, axis=1), jnp.concatenate(weights_BKGTS, axis=3)
