"""One transformer layer: norms, self-attention and MLP, sequential or parallel.

Axes: B batch, T query position, S key position, D model width, N heads, K key heads, H head width,
F MLP width.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax import sharding
from calm_jax.models.attention import Attention
from calm_jax.models.attention_choice import Need, chosen
from calm_jax.models.cache import KeysValues, Slots
from calm_jax.models.config import DecoderConfig
from calm_jax.models.execution import Execution
from calm_jax.models.inputs import Inputs
from calm_jax.models.layouts import residual_layout, split_by_heads, whole_length
from calm_jax.models.parameters import constant, matrix
from calm_jax.models.products import affine
from calm_jax.models.rotary import apply_rope, rope_angles, xpos_scale

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def rms_norm(x: jax.Array, scale: jax.Array | None, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32, in the shape and dtype of `x`.

    A missing scale is 1.
    """
    x_f32 = x.astype(jnp.float32)
    y = x_f32 * jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return (y if scale is None else y * scale.astype(jnp.float32)).astype(x.dtype)


class ForwardPass:
    """What the layers of a decoder share in one forward pass.

    Args:
        inputs: `filled` inputs.
        slots: the slots of a cache that already holds `inputs`; default: tokens see only `inputs`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        execution: Execution,
        inputs: Inputs,
        slots: Slots | None = None,
    ):
        self.config, self.execution = config, execution
        self.slots, self.slots_BT = slots, None if slots is None else slots.slots_of(inputs)
        keys = inputs if slots is None else slots.keys()
        need = Need.of_decoder("the decoder", config)
        self.attend = Attention(
            chosen(execution.attention, need, inputs, keys),
            inputs,
            keys,
            scale=config.scale,
            logit_cap=config.attention_logit_cap,
            window=config.window if any(config.local_layers) else None,
        )
        rotated = config.head_dim if config.rope_dim is None else config.rope_dim
        positions_BT = inputs.positions_BT
        if config.rope:
            self.angles = rope_angles(positions_BT, rotated, config.rope_base, config.rope_scaling)
            if any(config.local_layers) and config.local_rope_base is not None:
                self.local_angles = rope_angles(positions_BT, rotated, config.local_rope_base)
        if config.xpos_scale_base is not None:
            self.xpos = xpos_scale(positions_BT, config.head_dim, config.xpos_scale_base)

    def rotate(self, x_BTNH: jax.Array, local: jax.Array, *, keys: bool) -> jax.Array:
        """Queries [B, T, N, H], or keys, with rotary positions and xPos decay applied."""
        if self.config.rope:
            angles = self.angles
            if hasattr(self, "local_angles"):
                angles = jnp.where(local, self.local_angles, angles)
            x_BTNH = apply_rope(x_BTNH, angles, self.config.rope)
        if self.config.xpos_scale_base is not None:
            scaled = x_BTNH / self.xpos if keys else x_BTNH * self.xpos
            x_BTNH = scaled.astype(x_BTNH.dtype)
        return x_BTNH


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis; the scale is stored without `norm_offset`."""

    def __init__(self, width: int, axis: str | None, config: DecoderConfig):
        self.config = config
        self.scale = constant(1.0 - config.norm_offset, (width,), (axis,))
        self.bias = constant(0.0, (width,), (axis,)) if config.norm_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...].astype(jnp.float32) + self.config.norm_offset
        if self.config.norm == "rms":
            y = rms_norm(x, scale, self.config.norm_eps)
        else:
            x_f32 = x.astype(jnp.float32)
            centred = x_f32 - jnp.mean(x_f32, axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
            y = (centred * jax.lax.rsqrt(variance + self.config.norm_eps) * scale).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class SelfAttention(nnx.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.config = config
        self.query = matrix(rngs, (D, N, H), ("embed", "heads", "head_dim"), inputs=1)
        self.key = matrix(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), inputs=1)
        self.value = matrix(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), inputs=1)
        self.output = matrix(
            rngs, (N, H, D), ("heads", "head_dim", "embed"), inputs=2, scale=_branch_scale(config)
        )
        if config.attention_bias:
            self.query_bias = constant(0.0, (N, H), ("heads", "head_dim"))
            self.key_bias = constant(0.0, (K, H), ("kv_heads", "head_dim"))
            self.value_bias = constant(0.0, (K, H), ("kv_heads", "head_dim"))
        if config.output_bias:
            self.output_bias = constant(0.0, (D,), ("embed",))
        if config.qk_norm == "rms":
            self.query_norm = Norm(H, "head_dim", config)
            self.key_norm = Norm(H, "head_dim", config)
        elif config.qk_norm == "l2":
            self.query_norm = constant(1.0, (H,), ("head_dim",))
            self.key_norm = constant(1.0, (H,), ("head_dim",))

    def keys_and_values(
        self, x_BSD: jax.Array, forward: ForwardPass, local: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Rotated keys and values, [B, S, K, H] each, of normed states [B, S, D]."""
        k_BSKH = affine("BSD,DKH->BSKH", x_BSD, self, "key")
        v_BSKH = affine("BSD,DKH->BSKH", x_BSD, self, "value")
        k_BSKH = forward.rotate(self._normed("key", k_BSKH), local, keys=True)
        return split_by_heads(k_BSKH, "kv_heads"), split_by_heads(v_BSKH, "kv_heads")

    def attend(
        self,
        x_BTD: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        forward: ForwardPass,
        local: jax.Array,
    ) -> jax.Array:
        """Attention of normed states [B, T, D] to keys and values [B, S, K, H]: [B, T, D]."""
        q_BTNH = self._normed("query", affine("BTD,DNH->BTNH", x_BTD, self, "query"))
        q_BTNH = split_by_heads(forward.rotate(q_BTNH, local, keys=False))
        x_BTNH = split_by_heads(forward.attend(q_BTNH, k_BSKH, v_BSKH, local))
        return affine("BTNH,NHD->BTD", x_BTNH, self, "output")

    def _normed(self, name: str, x_BTNH: jax.Array) -> jax.Array:
        """Queries or keys after the norm per head, if the config has one."""
        if self.config.qk_norm is None:
            return x_BTNH
        norm = getattr(self, f"{name}_norm")
        return norm(x_BTNH) if self.config.qk_norm == "rms" else _l2_norm(x_BTNH, norm[...])


class Mlp(nnx.Module):
    """down(activation(gate(x)) * up(x)); without a gate, down(activation(up(x)))."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.mlp_dim
        self.config = config
        self.gate = matrix(rngs, (D, F), ("embed", "mlp"), inputs=1) if config.gated_mlp else None
        self.up = matrix(rngs, (D, F), ("embed", "mlp"), inputs=1)
        self.down = matrix(rngs, (F, D), ("mlp", "embed"), inputs=1, scale=_branch_scale(config))
        if config.mlp_bias:
            self.gate_bias = constant(0.0, (F,), ("mlp",)) if config.gated_mlp else None
            self.up_bias = constant(0.0, (F,), ("mlp",))
            self.down_bias = constant(0.0, (D,), ("embed",))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        hidden_BTF = affine("BTD,DF->BTF", x_BTD, self, "up")
        if self.config.gated_mlp:
            hidden_BTF *= activation(affine("BTD,DF->BTF", x_BTD, self, "gate"))
        else:
            hidden_BTF = activation(hidden_BTF)
        hidden_BTF = sharding.constrain(hidden_BTF, "batch", "length", "mlp")
        return affine("BTF,FD->BTD", hidden_BTF, self, "down")


class Layer(nnx.Module):
    """One layer of the residual stream."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = Norm(config.embed_dim, "embed", config)
        self.attention = SelfAttention(config, rngs)
        self.mlp = Mlp(config, rngs)
        if config.block == "sequential":
            self.mlp_norm = Norm(config.embed_dim, "embed", config)
        if config.post_norms:
            self.post_attention_norm = Norm(config.embed_dim, "embed", config)
            self.post_mlp_norm = Norm(config.embed_dim, "embed", config)

    def __call__(
        self,
        x_BTD: jax.Array,
        cache: KeysValues | None,
        forward: ForwardPass,
        local: jax.Array,
        number: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """The residual stream [B, T, D] after the layer, and the updated cache.

        Args:
            cache: the cache of all layers; None: tokens see only `x_BTD`.
            local: whether the layer sees only its window; a bool scalar.
            number: the layer's number in the cache.
        """
        x_BTD = residual_layout(x_BTD)
        with jax.named_scope("attention"):
            normed_BTD = whole_length(self.attention_norm(x_BTD))
            k_BSKH, v_BSKH = self.attention.keys_and_values(normed_BTD, forward, local)
            if cache is not None:
                cache = cache.write(number, forward.slots, forward.slots_BT, k_BSKH, v_BSKH)
                k_BSKH, v_BSKH = cache.read(number, forward.slots, x_BTD.dtype)
            attended_BTD = self.attention.attend(normed_BTD, k_BSKH, v_BSKH, forward, local)
            if self.config.post_norms:
                attended_BTD = self.post_attention_norm(residual_layout(attended_BTD))
        with jax.named_scope("mlp"):
            if self.config.block == "parallel":
                sum_BTD = residual_layout(attended_BTD + self.mlp(normed_BTD))
                return residual_layout(x_BTD + sum_BTD), cache
            x_BTD += residual_layout(attended_BTD)
            hidden_BTD = residual_layout(self.mlp(whole_length(self.mlp_norm(x_BTD))))
            if self.config.post_norms:
                hidden_BTD = self.post_mlp_norm(hidden_BTD)
            return residual_layout(x_BTD + hidden_BTD), cache


def _branch_scale(config: DecoderConfig) -> float:
    """Keeps the residual stream of a random model from growing with depth (GPT-2 §2.3)."""
    return (2 * config.num_layers) ** -0.5


def _l2_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x_f32 = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(jnp.square(x_f32), axis=-1, keepdims=True))
    return (x_f32 / jnp.maximum(length, 1e-12) * scale.astype(jnp.float32)).astype(x.dtype)
