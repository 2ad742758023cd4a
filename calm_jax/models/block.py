"""One transformer layer: norms, self-attention and MLP, sequential or parallel.

Axes: B batch, T position, D model width, N heads, K key heads, H head width, F MLP width.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax import sharding
from calm_jax.models.attention import SelfAttentionInputs
from calm_jax.models.config import DecoderConfig
from calm_jax.models.parameters import constant, matrix
from calm_jax.models.quantized import product

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis; statistics in float32, result in the dtype of `x`."""
    x_f32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return (x_f32 * inverse_rms * scale.astype(jnp.float32)).astype(x.dtype)


def stream(x_BTD: jax.Array) -> jax.Array:
    """Lays activations out as the residual stream: its length split over devices too."""
    return sharding.constrain(x_BTD, "batch", "stream_length", "activation_embed")


@jax.custom_vjp
def whole(x_BTD: jax.Array) -> jax.Array:
    """Gathers the length, as products need it whose results are split by heads or features.

    The gradient, which they leave as parts of a sum, is laid out as the residual stream.
    """
    return sharding.constrain(x_BTD, "batch", "length", "activation_embed")


whole.defvjp(lambda x_BTD: (whole(x_BTD), None), lambda _, gradient: (stream(gradient),))


def by_heads(x_BTNH: jax.Array, heads: str = "heads") -> jax.Array:
    """Splits queries, keys or values, and so their gradients, by heads."""
    return sharding.constrain(x_BTNH, "batch", "length", heads, "head_dim")


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis; the scale is stored as in the checkpoint."""

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

    def __call__(
        self, x_BTD: jax.Array, shared: SelfAttentionInputs, local: jax.Array
    ) -> jax.Array:
        cast = x_BTD.dtype
        q_BTNH = product("BTD,DNH->BTNH", x_BTD, self, "query")
        k_BSKH = product("BSD,DKH->BSKH", x_BTD, self, "key")
        v_BSKH = product("BSD,DKH->BSKH", x_BTD, self, "value")
        if self.config.attention_bias:
            q_BTNH += self.query_bias[...].astype(cast)
            k_BSKH += self.key_bias[...].astype(cast)
            v_BSKH += self.value_bias[...].astype(cast)
        if self.config.qk_norm == "rms":
            q_BTNH, k_BSKH = self.query_norm(q_BTNH), self.key_norm(k_BSKH)
        elif self.config.qk_norm == "l2":
            q_BTNH = _l2_norm(q_BTNH, self.query_norm[...])
            k_BSKH = _l2_norm(k_BSKH, self.key_norm[...])
        q_BTNH, k_BSKH = shared.rotate(q_BTNH, k_BSKH, local)
        q_BTNH = by_heads(q_BTNH)
        k_BSKH, v_BSKH = by_heads(k_BSKH, "kv_heads"), by_heads(v_BSKH, "kv_heads")
        x_BTNH = shared.attend(q_BTNH, k_BSKH, v_BSKH, local)
        y_BTD = product("BTNH,NHD->BTD", by_heads(x_BTNH), self, "output")
        return y_BTD + self.output_bias[...].astype(cast) if self.config.output_bias else y_BTD


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
        hidden_BTF = self._project("BTD,DF->BTF", x_BTD, "up")
        if self.config.gated_mlp:
            hidden_BTF *= activation(self._project("BTD,DF->BTF", x_BTD, "gate"))
        else:
            hidden_BTF = activation(hidden_BTF)
        hidden_BTF = sharding.constrain(hidden_BTF, "batch", "length", "mlp")
        return self._project("BTF,FD->BTD", hidden_BTF, "down")

    def _project(self, equation: str, x: jax.Array, name: str) -> jax.Array:
        y = product(equation, x, self, name)
        return y + getattr(self, f"{name}_bias")[...].astype(x.dtype) if self.config.mlp_bias else y


class Block(nnx.Module):
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
        self, x_BTD: jax.Array, shared: SelfAttentionInputs, local: jax.Array
    ) -> jax.Array:
        """The layer's output [B, T, D], in the dtype of `x_BTD`; `local`: it sees its window."""
        x_BTD = stream(x_BTD)
        with jax.named_scope("attention"):
            normed_BTD = whole(self.attention_norm(x_BTD))
            attended_BTD = self.attention(normed_BTD, shared, local)
            if self.config.post_norms:
                attended_BTD = self.post_attention_norm(stream(attended_BTD))
        with jax.named_scope("mlp"):
            if self.config.block == "parallel":
                return stream(x_BTD + stream(attended_BTD + self.mlp(normed_BTD)))
            x_BTD += stream(attended_BTD)
            hidden_BTD = stream(self.mlp(whole(self.mlp_norm(x_BTD))))
            if self.config.post_norms:
                hidden_BTD = self.post_mlp_norm(hidden_BTD)
            return stream(x_BTD + hidden_BTD)


def _branch_scale(config: DecoderConfig) -> float:
    """So that a random model's residual stream does not grow with its depth (GPT-2 §2.3)."""
    return (2 * config.num_layers) ** -0.5


def _l2_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x_f32 = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(jnp.square(x_f32), axis=-1, keepdims=True))
    return (x_f32 / jnp.maximum(length, 1e-12) * scale.astype(jnp.float32)).astype(x.dtype)
