"""Llama 2 and 3, Mistral, Qwen 2 and 3 (dense) as transformers publishes them.

All have a sequential block with plain RMSNorm and SwiGLU; they differ in biases, windows, norms on
heads, and in the meaning of absent keys of config.json.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from calm_jax.checkpoints.convert import huggingface_config as read
from calm_jax.checkpoints.convert.family import HuggingFaceFamily
from calm_jax.checkpoints.convert.table import Rule, Unused, rule
from calm_jax.errors import CalmError
from calm_jax.models import DecoderConfig

_ATTENTION, _MLP = "layers/attention", "layers/mlp"
_HEAD = rule("lm_head.weight", "head", "V D -> D V")
# Tensors below "model.layers.{layer}".
_MATRICES = {
    "self_attn.q_proj.weight": (f"{_ATTENTION}/query", "(N H) D -> D N H"),
    "self_attn.k_proj.weight": (f"{_ATTENTION}/key", "(K H) D -> D K H"),
    "self_attn.v_proj.weight": (f"{_ATTENTION}/value", "(K H) D -> D K H"),
    "self_attn.o_proj.weight": (f"{_ATTENTION}/output", "D (N H) -> N H D"),
    "mlp.gate_proj.weight": (f"{_MLP}/gate", "F D -> D F"),
    "mlp.up_proj.weight": (f"{_MLP}/up", "F D -> D F"),
    "mlp.down_proj.weight": (f"{_MLP}/down", "D F -> F D"),
}
_HEAD_NORMS = {
    "self_attn.q_norm.weight": (f"{_ATTENTION}/query_norm/scale", "H -> H"),
    "self_attn.k_norm.weight": (f"{_ATTENTION}/key_norm/scale", "H -> H"),
}
_ATTENTION_BIASES = {
    "self_attn.q_proj.bias": (f"{_ATTENTION}/query_bias", "(N H) -> N H"),
    "self_attn.k_proj.bias": (f"{_ATTENTION}/key_bias", "(K H) -> K H"),
    "self_attn.v_proj.bias": (f"{_ATTENTION}/value_bias", "(K H) -> K H"),
}
_OUTPUT_BIAS = {"self_attn.o_proj.bias": (f"{_ATTENTION}/output_bias", "D -> D")}
_MLP_BIASES = {
    "mlp.gate_proj.bias": (f"{_MLP}/gate_bias", "F -> F"),
    "mlp.up_proj.bias": (f"{_MLP}/up_bias", "F -> F"),
    "mlp.down_proj.bias": (f"{_MLP}/down_bias", "D -> D"),
}


class Llama(HuggingFaceFamily):
    """Llama 2 and 3; other families override what differs."""

    name = "llama"
    architectures = ("LlamaForCausalLM",)
    model_type = "llama"
    # The values of absent keys of config.json (transformers' LlamaConfig). By default there are as
    # many key heads as heads, and all heads together are as wide as the model.
    defaults: ClassVar[Mapping[str, int]] = {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    norms: ClassVar[Mapping[str, tuple[str, str]]] = {
        "input_layernorm.weight": ("layers/attention_norm/scale", "D -> D"),
        "post_attention_layernorm.weight": ("layers/mlp_norm/scale", "D -> D"),
    }
    eps_key: ClassVar[str] = "rms_norm_eps"

    def decoder_config(self, values: Mapping[str, Any], where: str) -> DecoderConfig:
        sizes = self.sizes(values, where)
        rope_base, rope_scaling = read.rope(values, where)
        return DecoderConfig.llama(
            **sizes,
            norm_eps=read.number(values, self.eps_key, where, 1e-6),
            activation=read.activation(values, "hidden_act", where, "silu"),
            tied_head=read.boolean(values, "tie_word_embeddings", where, False),
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            **self.own_fields(values, where, sizes["num_layers"]),
        )

    def sizes(self, values: Mapping[str, Any], where: str) -> dict[str, int]:
        """`DecoderConfig` fields for widths and counts."""
        found = {
            read.SIZES[key]: read.optional_whole_number(values, key, where, self.defaults.get(key))
            if key in ("num_key_value_heads", "head_dim")
            else read.whole_number(values, key, where, self.defaults[key])
            for key in read.SIZES
        }
        found["num_kv_heads"] = found["num_kv_heads"] or found["num_heads"]
        if found["head_dim"] is None:
            whole = {**self.defaults, **values}
            found["head_dim"] = read.quotient(whole, "hidden_size", "num_attention_heads", where)
        return found

    def own_fields(self, values: Mapping[str, Any], where: str, num_layers: int) -> dict[str, Any]:
        """`DecoderConfig` fields that differ between the families."""
        return {
            **bias_everywhere(values, where),
            "mlp_bias": read.boolean(values, "mlp_bias", where, False),
        }

    def huggingface_config(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "architectures": [self.architectures[0]],
            "model_type": self.model_type,
            **{key: getattr(config, field) for key, field in read.SIZES.items()},
            "hidden_act": read.ACTIVATION_NAMES[config.activation],
            self.eps_key: config.norm_eps,
            "tie_word_embeddings": config.tied_head,
            **read.rope_keys(config.rope_base, config.rope_scaling),
            **self.own_keys(config),
        }

    def own_keys(self, config: DecoderConfig) -> dict[str, Any]:
        """The inverse of `own_fields`."""
        return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}

    def rules(self, config: DecoderConfig) -> tuple[Rule, ...]:
        of_a_layer = (
            _MATRICES
            | dict(self.norms)
            | (_HEAD_NORMS if config.qk_norm else {})
            | (_ATTENTION_BIASES if config.attention_bias else {})
            | (_OUTPUT_BIAS if config.output_bias else {})
            | (_MLP_BIASES if config.mlp_bias else {})
        )
        return (
            rule("model.embed_tokens.weight", "embedding", "V D -> V D"),
            *(rule(f"model.layers.{{layer}}.{name}", *ours) for name, ours in of_a_layer.items()),
            rule("model.norm.weight", "final_norm/scale", "D -> D"),
            *(() if config.tied_head else (_HEAD,)),
        )

    def unused(self, config: DecoderConfig) -> tuple[Unused, ...]:
        buffers = Unused(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
        if not config.tied_head:
            return (buffers,)
        return (buffers, Unused(r"lm_head\.weight", "same", "model.embed_tokens.weight"))


class Mistral(Llama):
    """Mistral: a window on every layer, or (from version 0.2 on) on none."""

    name = "mistral"
    architectures = ("MistralForCausalLM",)
    model_type = "mistral"
    defaults: ClassVar[Mapping[str, int]] = {
        **Llama.defaults,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
    }

    def own_fields(self, values: Mapping[str, Any], where: str, num_layers: int) -> dict[str, Any]:
        window = read.optional_whole_number(values, "sliding_window", where, 4096)
        local = read.local_layers(values, where, num_layers)
        # transformers reads this key but does not apply it.
        if local is not None and set(local) != {window is not None}:
            raise CalmError(
                f"{where}: layer_types contradicts sliding_window {window}, which is for all layers"
            )
        return {"window": window}

    def own_keys(self, config: DecoderConfig) -> dict[str, Any]:
        return {"sliding_window": config.window}


class Qwen2(Llama):
    """Qwen 2 and 2.5: biases on query, key and value; later layers may be local."""

    name = "qwen2"
    architectures = ("Qwen2ForCausalLM",)
    model_type = "qwen2"
    defaults: ClassVar[Mapping[str, int]] = {
        **Llama.defaults,
        "vocab_size": 151_936,
        "intermediate_size": 22_016,
        "num_key_value_heads": 32,
    }

    def own_fields(self, values: Mapping[str, Any], where: str, num_layers: int) -> dict[str, Any]:
        return {"attention_bias": True, **_later_layers_local(values, where, num_layers)}

    def own_keys(self, config: DecoderConfig) -> dict[str, Any]:
        local = config.local_layers
        return {
            "use_sliding_window": any(local),
            "sliding_window": config.window,
            "max_window_layers": (*local, True).index(True),
            "layer_types": [read.LOCAL if here else read.GLOBAL for here in local],
        }


class Qwen3(Qwen2):
    """Qwen 3: norms on heads instead of biases."""

    name = "qwen3"
    architectures = ("Qwen3ForCausalLM",)
    model_type = "qwen3"
    defaults: ClassVar[Mapping[str, int]] = {**Qwen2.defaults, "head_dim": 128}

    def own_fields(self, values: Mapping[str, Any], where: str, num_layers: int) -> dict[str, Any]:
        return {
            "qk_norm": "rms",
            **bias_everywhere(values, where),
            **_later_layers_local(values, where, num_layers),
        }

    def own_keys(self, config: DecoderConfig) -> dict[str, Any]:
        return {"attention_bias": config.attention_bias, **super().own_keys(config)}


def bias_everywhere(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Biases on query, key, value and output, or on none of them."""
    bias = read.boolean(values, "attention_bias", where, False)
    return {"attention_bias": bias, "output_bias": bias}


def _later_layers_local(values: Mapping[str, Any], where: str, num_layers: int) -> dict[str, Any]:
    """Windows of Qwen: off unless `use_sliding_window`, whatever `sliding_window` says."""
    window = None
    if read.boolean(values, "use_sliding_window", where, False):
        window = read.optional_whole_number(values, "sliding_window", where, 4096)
    local = read.local_layers(values, where, num_layers)
    if local is None:
        first = read.whole_number(values, "max_window_layers", where, 28, least=0)
        local = [window is not None and layer >= first for layer in range(num_layers)]
    if any(local) and window is None:
        raise CalmError(f"{where}: layer_types has {read.LOCAL}, but there is no sliding_window")
    return read.local_layer_fields(local, window)
