"""The bridge: for each connection a linear projection and a causal multi-head cross-attention.

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
from calm_jax.models.block import by_heads, rms_norm, stream, whole
from calm_jax.models.config import CompositionConfig, DecoderConfig
from calm_jax.models.execution import Execution
from calm_jax.models.parameters import constant, matrix
from calm_jax.models.rotary import apply_rope, rope_angles

NORM_EPS = 1e-6
ROPE_BASE = 10_000.0


class BridgeInputs:
    """What every connection of one augment shares in a forward pass: attention and angles."""

    def __init__(
        self,
        config: CompositionConfig,
        head_dim: int,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        prompt_mask_BT: jax.Array | None,
        execution: Execution,
    ):
        self.execution = execution
        key_segments_BS = None
        if config.encoder_only:
            if prompt_mask_BT is None:
                raise CalmError(
                    "composition.encoder_only needs the prompt: the batch has no "
                    "'decoder_causal_attention'"
                )
            key_segments_BS = jnp.where(prompt_mask_BT == 1, segment_ids_BT, 0)
        self.attend = Attention(
            execution.attention, segment_ids_BT, key_segments_BS, scale=head_dim**-0.5
        )
        self.angles_BTR = rope_angles(positions_BT, head_dim, ROPE_BASE) if config.rotary else None


class CrossAttention(nnx.Module):
    """f_proj and f_cross of one connection, parameters in float32."""

    def __init__(
        self, config: CompositionConfig, anchor: DecoderConfig, augment_dim: int, rngs: nnx.Rngs
    ):
        D, E = anchor.embed_dim, augment_dim
        N, H = heads(config, anchor)
        into_heads = ("embed", "heads", "head_dim")
        self.config = config
        self.head_dim = H
        self.projection = matrix(rngs, (E, D), ("augment_embed", "embed"), inputs=1)
        self.query = matrix(rngs, (D, N, H), into_heads, inputs=1)
        self.key = matrix(rngs, (D, N, H), into_heads, inputs=1)
        self.value = matrix(rngs, (D, N, H), into_heads, inputs=1)
        if config.output_projection:
            self.output = matrix(rngs, (N, H, D), ("heads", "head_dim", "embed"), inputs=2)
        if config.bias:
            # None on the key: a constant added to every key changes no softmax.
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
            # Exactly one factor of the result starts at zero: with two, nothing would ever learn.
            last = self.output if config.output_projection else self.value
            last.set_value(jnp.zeros_like(last.get_value()))

    def __call__(
        self, h_BTD: jax.Array, tap_BSE: jax.Array, shared: BridgeInputs
    ) -> tuple[jax.Array, jax.Array | None]:
        """f_cross(f_proj(tap), h), without the residual.

        Args:
            h_BTD: the anchor layer's output; its dtype is the compute dtype.
            tap_BSE: the augment layer's output at the same positions.

        Returns:
            [B, T, D] in the dtype of `h_BTD`, exactly 0 where a query has nothing to see; and the
            attention weights, float32 [B, N, T, S], that the backend "xla" alone has, else None.
        """
        config, cast = self.config, h_BTD.dtype
        q_in_BTD = h_BTD
        if config.norms:
            q_in_BTD = rms_norm(q_in_BTD, self.query_norm[...], NORM_EPS)
            tap_BSE = rms_norm(tap_BSE, self.tap_norm[...], NORM_EPS)
        projected_BSD = tap_BSE.astype(cast) @ self.projection[...].astype(cast)
        if config.bias:
            projected_BSD += self.projection_bias[...].astype(cast)
        # Each device projects its part of the length before the whole is gathered.
        q_in_BTD, projected_BSD = whole(q_in_BTD), whole(stream(projected_BSD))
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", q_in_BTD, self.query[...].astype(cast))
        k_BSNH = jnp.einsum("BSD,DNH->BSNH", projected_BSD, self.key[...].astype(cast))
        v_BSNH = jnp.einsum("BSD,DNH->BSNH", projected_BSD, self.value[...].astype(cast))
        if config.bias:
            q_BTNH += self.query_bias[...].astype(cast)
            v_BSNH += self.value_bias[...].astype(cast)
        if config.rotary:
            q_BTNH = apply_rope(q_BTNH, shared.angles_BTR, "half")
            k_BSNH = apply_rope(k_BSNH, shared.angles_BTR, "half")
        q_BTNH, k_BSNH, v_BSNH = by_heads(q_BTNH), by_heads(k_BSNH), by_heads(v_BSNH)
        weights_BNTS = None
        if shared.attend.backend == "xla":
            x_BTNH, weights_BNTS = shared.attend.with_weights(q_BTNH, k_BSNH, v_BSNH)
        else:
            x_BTNH = shared.attend(q_BTNH, k_BSNH, v_BSNH)
        x_BTNH = by_heads(x_BTNH)
        if config.output_projection:
            y_BTD = jnp.einsum("BTNH,NHD->BTD", x_BTNH, self.output[...].astype(cast))
            if config.bias:
                y_BTD += self.output_bias[...].astype(cast)
        else:
            y_BTD = x_BTNH.reshape(h_BTD.shape)
        if config.gate:
            y_BTD *= self.gate[...].astype(cast)
        return jnp.where(shared.attend.sees_any_BT[:, :, None], stream(y_BTD), 0), weights_BNTS


def heads(config: CompositionConfig, anchor: DecoderConfig) -> tuple[int, int]:
    """(number of heads, head width) of f_cross for an anchor.

    Raises `CalmError` when the heads do not divide the anchor's width and no width is given, or
    when they do not fill it although there is no output projection.
    """
    N = anchor.num_heads if config.num_heads is None else config.num_heads
    if N < 1:
        raise CalmError(f"composition.num_heads is {N}; it must be at least 1")
    if config.head_dim is None and anchor.embed_dim % N:
        raise CalmError(
            f"composition.num_heads {N} does not divide the anchor's width {anchor.embed_dim}; "
            "give composition.head_dim, or other heads"
        )
    H = anchor.embed_dim // N if config.head_dim is None else config.head_dim
    if H < 1:
        raise CalmError(f"composition.head_dim is {H}; it must be at least 1")
    if not config.output_projection and anchor.embed_dim != N * H:
        raise CalmError(
            f"composition.output_projection=False needs num_heads x head_dim = {N} x {H} to be the "
            f"anchor's width {anchor.embed_dim}"
        )
    if config.rotary and H % 2:
        raise CalmError(f"composition.rotary needs an even head_dim, not {H}")
    return N, H
