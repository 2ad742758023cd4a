"""The bridge of one connection: a linear projection and causal multi-head cross-attention.

CALM, arXiv 2401.02412 §3.1:

    H_(A+B),j = H_B,j + f_cross(f_proj(H_A,i), H_B,j)

Axes: B batch, T anchor position (query), S augment position (key), D anchor width, E augment width,
N heads, H head width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax.errors import CalmError
from calm_jax.models.attention import Attention
from calm_jax.models.attention_choice import Need, chosen
from calm_jax.models.cache import Slots
from calm_jax.models.config import CompositionConfig, DecoderConfig, heads
from calm_jax.models.execution import Execution
from calm_jax.models.inputs import Inputs
from calm_jax.models.layer import rms_norm
from calm_jax.models.layouts import residual_layout, split_by_heads, whole_length
from calm_jax.models.parameters import constant, matrix, weight
from calm_jax.models.rotary import apply_rope, rope_angles

NORM_EPS = 1e-6
ROPE_BASE = 10_000.0


class BridgePass:
    """What the connections of one augment share in one forward pass.

    Args:
        queries: the anchor's `filled` inputs [B, T].
        taps: the augment's `filled` inputs [B, S]; default: `queries`.
        slots: the slots of a cache that already holds `taps`; default: queries see only `taps`.

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
    ):
        taps = queries if taps is None else taps
        keys = taps if slots is None else slots.keys()
        if config.encoder_only:
            if taps.prompt_mask_BT is None:
                raise CalmError(
                    "composition.encoder_only needs the prompt: the batch has no "
                    "'decoder_causal_attention'"
                )
            keys = keys.prompt()
        self.slots, self.slots_BS = slots, None if slots is None else slots.slots_of(taps)
        head_dim = heads(config, anchor)[1]
        self.attend = Attention(
            chosen(execution.attention, Need.of_bridge(config, anchor), queries, keys),
            queries,
            None if keys is queries else keys,
            scale=head_dim**-0.5,
        )
        if config.rotary:
            self.query_angles = rope_angles(queries.positions_BT, head_dim, ROPE_BASE)
            self.key_angles = rope_angles(taps.positions_BT, head_dim, ROPE_BASE)


class CrossAttention(nnx.Module):
    """f_proj and f_cross of one connection, with float32 parameters."""

    def __init__(
        self, config: CompositionConfig, anchor: DecoderConfig, augment_dim: int, rngs: nnx.Rngs
    ):
        D, E = anchor.embed_dim, augment_dim
        N, H = heads(config, anchor)
        into_heads = ("embed", "heads", "head_dim")
        self.config = config
        self.projection = matrix(rngs, (E, D), ("augment_embed", "embed"), inputs=1)
        self.query = matrix(rngs, (D, N, H), into_heads, inputs=1)
        self.key = matrix(rngs, (D, N, H), into_heads, inputs=1)
        self.value = matrix(rngs, (D, N, H), into_heads, inputs=1)
        if config.output_projection:
            self.output = matrix(rngs, (N, H, D), ("heads", "head_dim", "embed"), inputs=2)
        if config.bias:
            # No bias on keys: the same vector added to every key does not change the softmax.
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
        self, tap_BSE: jax.Array, dtype: jnp.dtype, forward: BridgePass
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, N, H] of a tap [B, S, E], in the compute dtype `dtype`."""
        config = self.config
        if config.norms:
            tap_BSE = rms_norm(tap_BSE, self.tap_norm[...], NORM_EPS)
        x_BSD = tap_BSE.astype(dtype)
        if self.projection is not None:
            x_BSD @= self.projection[...].astype(dtype)
            if config.bias:
                x_BSD += self.projection_bias[...].astype(dtype)
        # Each device projects its part of the length before the full length is gathered.
        x_BSD = whole_length(residual_layout(x_BSD))
        k_BSNH = jnp.einsum("BSD,DNH->BSNH", x_BSD, self.key[...].astype(dtype))
        v_BSNH = jnp.einsum("BSD,DNH->BSNH", x_BSD, self.value[...].astype(dtype))
        if config.bias:
            v_BSNH += self.value_bias[...].astype(dtype)
            if self.projection is None:
                k_BSNH += self.key_bias[...].astype(dtype)
        if config.rotary:
            k_BSNH = apply_rope(k_BSNH, forward.key_angles, "half")
        return split_by_heads(k_BSNH), split_by_heads(v_BSNH)

    def absorbed(self) -> "CrossAttention":
        """The same function with f_proj multiplied into keys and values: fewer weights to read.

        Arrays may have leading axes, of a stack. They are new ones; the others are shared.
        """
        copy = nnx.merge(*nnx.split(self))
        projection = self.projection[...]

        def through(x, matrix):
            return jnp.einsum(
                "...ED,...DNH->...ENH", x, matrix, precision=jax.lax.Precision.HIGHEST
            )

        axes = ("augment_embed", "heads", "head_dim")
        for name in ("key", "value"):
            matrix = getattr(self, name)[...]
            setattr(copy, name, weight(through(projection, matrix), axes, summed=(-3,)))
            if self.config.bias:
                bias = through(self.projection_bias[...][..., None, :], matrix)[..., 0, :, :]
                if name == "value":
                    bias += self.value_bias[...]
                setattr(copy, f"{name}_bias", nnx.Param(bias, axes=("heads", "head_dim")))
        copy.projection = None
        if self.config.bias:
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
            [B, T, D] in the dtype of `h_BTD`, exactly 0 where a query sees no key; and attention
            weights, float32 [B, N, T, S], or None if the backend is not "xla".
        """
        config, dtype = self.config, h_BTD.dtype
        q_in_BTD = rms_norm(h_BTD, self.query_norm[...], NORM_EPS) if config.norms else h_BTD
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", whole_length(q_in_BTD), self.query[...].astype(dtype))
        if config.bias:
            q_BTNH += self.query_bias[...].astype(dtype)
        if config.rotary:
            q_BTNH = apply_rope(q_BTNH, forward.query_angles, "half")
        q_BTNH, weights_BNTS = split_by_heads(q_BTNH), None
        if forward.attend.backend == "xla":
            x_BTNH, weights_BNTS = forward.attend.with_weights(q_BTNH, k_BSNH, v_BSNH)
        else:
            x_BTNH = forward.attend(q_BTNH, k_BSNH, v_BSNH)
        x_BTNH = split_by_heads(x_BTNH)
        if config.output_projection:
            y_BTD = jnp.einsum("BTNH,NHD->BTD", x_BTNH, self.output[...].astype(dtype))
            if config.bias:
                y_BTD += self.output_bias[...].astype(dtype)
        else:
            y_BTD = x_BTNH.reshape(h_BTD.shape)
        if config.gate:
            y_BTD *= self.gate[...].astype(dtype)
        sees_any_BT1 = forward.attend.sees_any_BT[:, :, None]
        return jnp.where(sees_any_BT1, residual_layout(y_BTD), 0), weights_BNTS
