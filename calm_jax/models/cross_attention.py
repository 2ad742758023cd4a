"""The bridge of one connection: a linear projection and causal multi-head cross-attention.

CALM, arXiv 2401.02412 §3.1:

    H_(A+B),j = H_B,j + f_cross(f_proj(H_A,i), H_B,j)

A cache keeps either keys and values, or the *latent* from which they are computed: the tap, normed
but not scaled, which all connections to a tapped layer share. Attention to latents has one key head
as wide as the augment: each query goes through W_K, and each sum of latents through W_V, as in
multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

Axes: B batch, T anchor position (query), S augment position (key), D anchor width, E augment width,
N heads, H head width.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax.errors import CalmError
from calm_jax.models.attention import Attention
from calm_jax.models.attention_choice import Need, chosen
from calm_jax.models.cache import Slots, Vectors
from calm_jax.models.config import CompositionConfig, DecoderConfig, heads
from calm_jax.models.execution import Execution
from calm_jax.models.inputs import Inputs
from calm_jax.models.layer import rms_norm
from calm_jax.models.layouts import residual_layout, split_by_heads, split_by_width, whole_length
from calm_jax.models.parameters import constant, matrix, weight
from calm_jax.models.products import biased, contract
from calm_jax.models.rotary import apply_rope, rope_angles

NORM_EPS = 1e-6
ROPE_BASE = 10_000.0


class KeyPass:
    """What the keys and values of the connections of one augment share in one forward pass.

    Args:
        taps: the augment's `filled` inputs [B, S].
        slots: the slots of a cache that already holds `taps`; None: there is no cache.
    """

    def __init__(
        self, config: CompositionConfig, anchor: DecoderConfig, taps: Inputs, slots: Slots | None
    ):
        self.slots, self.slots_BS = slots, None if slots is None else slots.slots_of(taps)
        if config.rotary:
            head_dim = heads(config, anchor)[1]
            self.key_angles = rope_angles(taps.positions_BT, head_dim, ROPE_BASE)


class BridgePass(KeyPass):
    """What the connections of one augment share in one forward pass.

    Args:
        queries: the anchor's `filled` inputs [B, T].
        taps: the augment's `filled` inputs [B, S]; default: `queries`.
        slots: the slots of a cache that already holds `taps`; default: queries see only `taps`.
        latents: the cache of the augment's latents, which already holds those of `taps`; default:
            connections compute keys and values of `taps`, and cache them if there is a cache.
        written: whether the caches already hold all keys and values too: `taps` are not used.

    Raises:
        CalmError: `encoder_only` is set and the inputs have no prompt mask.
    """

    def __init__(
        self,
        config: CompositionConfig,
        anchor: DecoderConfig,
        execution: Execution,
        queries: Inputs,
        taps: Inputs | None = None,
        slots: Slots | None = None,
        latents: Vectors | None = None,
        written: bool = False,
    ):
        taps = queries if taps is None else taps
        super().__init__(config, anchor, taps, slots)
        keys = taps if slots is None else slots.keys()
        if config.encoder_only:
            if taps.prompt_mask_BT is None:
                raise CalmError(
                    "composition.encoder_only needs the prompt: the batch has no "
                    "'decoder_causal_attention'"
                )
            keys = keys.prompt()
        self.latents, self.written = latents, written
        head_dim = heads(config, anchor)[1]
        latent_dim = None if latents is None else latents.values_LBKSH.shape[-1]
        need = Need.of_bridge(config, anchor, latent_dim)
        backend = chosen(execution.attention, need, queries, keys)
        self.attend = Attention(backend, queries, keys, scale=head_dim**-0.5)
        if config.rotary:
            self.query_angles = rope_angles(queries.positions_BT, head_dim, ROPE_BASE)


class CrossAttention(nnx.Module):
    """f_proj and f_cross of one connection, with float32 parameters."""

    def __init__(
        self, config: CompositionConfig, anchor: DecoderConfig, augment_dim: int, rngs: nnx.Rngs
    ):
        D, E = anchor.embed_dim, augment_dim
        N, H = heads(config, anchor)
        into_heads = ("embed", "heads", "head_dim")
        self.config = config
        self.heads_first = False  # whether W_K is [N, H, E] and W_V [N, E, H]; see `absorbed`
        self.projection = matrix(rngs, (E, D), ("augment_embed", "embed"), inputs=1)
        self.query = matrix(rngs, (D, N, H), into_heads, inputs=1)
        self.key = matrix(rngs, (D, N, H), into_heads, inputs=1)
        self.value = matrix(rngs, (D, N, H), into_heads, inputs=1)
        if config.output_projection:
            self.output = matrix(rngs, (N, H, D), ("heads", "head_dim", "embed"), inputs=2)
        if config.bias:
            # No bias on keys: adding one vector to every key does not change the softmax.
            self.projection_bias = constant(0.0, (D,), ("embed",))
            self.query_bias = constant(0.0, (N, H), ("heads", "head_dim"))
            self.value_bias = constant(0.0, (N, H), ("heads", "head_dim"))
            if config.output_projection:
                self.output_bias = constant(0.0, (D,), ("embed",))
        if config.norms:
            self.query_norm = constant(1.0, (D,), ("embed",))
            self.tap_norm = constant(1.0, (E,), ("augment_embed",))
        if config.gate:
            self.gate = constant(0.0 if config.init == "zero" else 1.0, (), ())
        elif config.init == "zero":
            # Exactly one factor of the result starts at zero: two would make all gradients zero.
            last = self.output if config.output_projection else self.value
            last.set_value(jnp.zeros_like(last.get_value()))

    def keys_and_values(
        self, tap_BSE: jax.Array, dtype: jnp.dtype, forward: KeyPass
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, N, H] of a tap [B, S, E], in the compute dtype `dtype`."""
        config = self.config
        if config.norms:
            scale = None if self.tap_norm is None else self.tap_norm[...]
            tap_BSE = rms_norm(tap_BSE, scale, NORM_EPS)
        return self._projected(tap_BSE.astype(dtype), forward)

    def absorbed(self) -> "CrossAttention":
        """The same function with f_proj, and its norm's scale, multiplied into W_K and W_V.

        Decoding then reads fewer weights. Arrays may have the leading axes of a stack. The products
        are new arrays; all others are shared.
        """
        config, copy = self.config, nnx.merge(*nnx.split(self))
        # Each head multiplies queries, and sums of latents, by a matrix whose first axis is summed
        # over. With other orders of axes every step copies the weights, or reads them slowly.
        copy.heads_first = not config.rotary
        projection = self.projection[...]
        if config.norms:
            projection = self.tap_norm[...][..., None] * projection
            copy.tap_norm = None

        through = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        axes = {"E": "augment_embed", "N": "heads", "H": "head_dim"}
        orders = ("NHE", "NEH") if copy.heads_first else ("ENH", "ENH")
        for name, order in zip(("key", "value"), orders, strict=True):
            matrix = getattr(self, name)[...]
            product = through(f"...ED,...DNH->...{order}", projection, matrix)
            named = tuple(axes[axis] for axis in order)
            setattr(copy, name, weight(product, named, summed=(order.index("E") - 3,)))
            # Adding one vector to every key does not change the softmax, unless keys are rotated.
            if config.bias and (name == "value" or config.rotary):
                bias = through("...D,...DNH->...NH", self.projection_bias[...], matrix)
                if name == "value":
                    bias += self.value_bias[...]
                setattr(copy, f"{name}_bias", nnx.Param(bias, axes=("heads", "head_dim")))
        copy.projection = None
        if config.bias:
            copy.projection_bias = None
        return copy

    def attend(
        self, h_BTD: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, forward: BridgePass
    ) -> tuple[jax.Array, jax.Array | None]:
        """f_cross(f_proj(tap), h), to be added to the residual stream.

        Args:
            h_BTD: the anchor layer's output [B, T, D]; its dtype is the compute dtype.
            k_BSNH, v_BSNH: keys and values of the tap.

        Returns:
            [B, T, D] in the dtype of `h_BTD`, exactly 0 where a query sees no key; and the weights
            of `Attention.with_weights`.
        """
        q_BTNH = self._queries(h_BTD, forward)
        x_BTNH, weights_BNTS = forward.attend.with_weights(q_BTNH, k_BSNH, v_BSNH)
        return self._result(h_BTD, split_by_heads(x_BTNH), forward), weights_BNTS

    def attend_to_latents(
        self, h_BTD: jax.Array, latent_BSE: jax.Array, forward: BridgePass
    ) -> jax.Array:
        """As `attend`, for the latents [B, S, E] of the tap in the dtype of `h_BTD`."""
        if self.projection is not None:
            return self.absorbed().attend_to_latents(h_BTD, latent_BSE, forward)
        dtype, (_, E, H) = h_BTD.dtype, self.value.shape
        if expands(h_BTD.shape[1], latent_BSE.shape[1], E, H):
            return self.attend(h_BTD, *self._projected(latent_BSE, forward), forward)[0]
        q_BTNH = self._queries(h_BTD, forward)
        # Results in the order of `einsum` itself: else it swaps the factors, and XLA copies more.
        q_NBTE = jnp.einsum("BTNH,NHE->NBTE", q_BTNH, self.key[...].astype(dtype))
        q_BTNE = jnp.einsum("NBTE->BTNE", q_NBTE)
        latent_BS1E = latent_BSE[:, :, None]
        x_BTNE = forward.attend(split_by_width(q_BTNE), latent_BS1E, latent_BS1E)
        x_BTNE, value_NEH = split_by_width(x_BTNE), self.value[...].astype(dtype)
        x_BTNH = jnp.einsum("NBTH->BTNH", jnp.einsum("BTNE,NEH->NBTH", x_BTNE, value_NEH))
        x_BTNH = biased(x_BTNH, self, "value")  # once, since weights add up to 1
        return self._result(h_BTD, split_by_heads(x_BTNH), forward)

    def _projected(self, x_BSE: jax.Array, forward: KeyPass) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, N, H] of a normed tap [B, S, E], in its dtype."""
        x_BSD, dtype = x_BSE, x_BSE.dtype
        if self.projection is not None:
            x_BSD = biased(x_BSD @ self.projection[...].astype(dtype), self, "projection")
        # Each device projects its part of the length, then the full length is gathered.
        x_BSD = whole_length(residual_layout(x_BSD))
        of_key, of_value = ("NHD", "NDH") if self.heads_first else ("DNH", "DNH")
        k_BSNH = jnp.einsum(f"BSD,{of_key}->BSNH", x_BSD, self.key[...].astype(dtype))
        v_BSNH = jnp.einsum(f"BSD,{of_value}->BSNH", x_BSD, self.value[...].astype(dtype))
        k_BSNH, v_BSNH = biased(k_BSNH, self, "key"), biased(v_BSNH, self, "value")
        if self.config.rotary:
            k_BSNH = apply_rope(k_BSNH, forward.key_angles, "half")
        return split_by_heads(k_BSNH), split_by_heads(v_BSNH)

    def _queries(self, h_BTD: jax.Array, forward: BridgePass) -> jax.Array:
        config, dtype = self.config, h_BTD.dtype
        q_in_BTD = rms_norm(h_BTD, self.query_norm[...], NORM_EPS) if config.norms else h_BTD
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", whole_length(q_in_BTD), self.query[...].astype(dtype))
        q_BTNH = biased(q_BTNH, self, "query")
        if config.rotary:
            q_BTNH = apply_rope(q_BTNH, forward.query_angles, "half")
        return split_by_heads(q_BTNH)

    def _result(self, h_BTD: jax.Array, x_BTNH: jax.Array, forward: BridgePass) -> jax.Array:
        """The result of `attend`, given each head's sum of values."""
        config, dtype = self.config, h_BTD.dtype
        if config.output_projection:
            y_BTD = contract("BTNH,NHD->BTD", x_BTNH, self.output[...].astype(dtype))
            y_BTD = biased(y_BTD, self, "output")
        else:
            y_BTD = x_BTNH.reshape(h_BTD.shape)
        if config.gate:
            y_BTD *= self.gate[...].astype(dtype)
        sees_any_BT1 = forward.attend.sees_any_BT[:, :, None]
        return jnp.where(sees_any_BT1, residual_layout(y_BTD), 0)


def latent(tap_BSE: jax.Array, config: CompositionConfig) -> jax.Array:
    """The tap, normed but not scaled: the input of every connection's keys and values."""
    return rms_norm(tap_BSE, None, NORM_EPS) if config.norms else tap_BSE


def expands(queries: int, slots: int, width: int, head_dim: int) -> bool:
    """Whether projecting latents to keys and values takes fewer FLOPs than attending to latents.

    Each head takes 4·E·H·S for the projections and 4·T·S·H for attention, against 4·T·E·H for
    queries and results and 4·T·S·E for attention to latents: fewer from about T > H on.
    """
    return slots * head_dim * (width + queries) < queries * width * (head_dim + slots)
