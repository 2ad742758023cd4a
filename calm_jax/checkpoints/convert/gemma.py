"""Gemma 1, 2 and 3 as transformers publishes them; from Gemma 3 with vision, the language model.

All norms are zero-centred, the residual stream starts as the embedding times sqrt(width), and the
head is the embedding. The name `post_attention_layernorm` means two things: in Gemma 1 the norm
before the MLP, as in Llama; in Gemma 2 and 3 the norm on the attention's result.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from calm_jax.checkpoints.convert import huggingface_config as read
from calm_jax.checkpoints.convert.llama import Llama
from calm_jax.checkpoints.convert.table import Unused
from calm_jax.errors import CalmError
from calm_jax.models import DecoderConfig

_CAPS = {
    "attn_logit_softcapping": "attention_logit_cap",
    "final_logit_softcapping": "final_logit_cap",
}
# The language model within a model with vision, and its head.
_WITHIN = re.compile(r"^(model\.language_model|language_model\.model)\.")


class Gemma(Llama):
    """Gemma 1: another model with Llama's names; every layer is global."""

    name = "gemma"
    architectures = ("GemmaForCausalLM",)
    model_type = "gemma"
    # The values of absent keys of config.json (transformers' GemmaConfig).
    defaults: ClassVar[Mapping[str, int]] = {
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
    }

    def decoder_config(self, values: Mapping[str, Any], where: str) -> DecoderConfig:
        read.refuse(values, where, "attention_bias", False)
        read.refuse(values, where, "use_bidirectional_attention", False, None)
        sizes = self.sizes(values, where)
        return DecoderConfig.gemma(
            **sizes,
            norm_eps=read.number(values, "rms_norm_eps", where, 1e-6),
            activation=self.activation(values, where),
            tied_head=read.boolean(values, "tie_word_embeddings", where, True),
            **self.rope_fields(values, where),
            **self.own_fields(values, where, sizes["num_layers"]),
        )

    def activation(self, values: Mapping[str, Any], where: str) -> str:
        # Published as "gelu", but trained with its tanh approximation.
        if values.get("hidden_act") == "gelu":
            return "gelu_tanh"
        return read.activation(values, "hidden_act", where, "gelu_tanh")

    def rope_fields(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`DecoderConfig` fields of the rotary positions."""
        base, scaling = read.rope(values, where)
        return {"rope_base": base, "rope_scaling": scaling}

    def own_fields(self, values: Mapping[str, Any], where: str, num_layers: int) -> dict[str, Any]:
        return {}

    def own_keys(self, config: DecoderConfig) -> dict[str, Any]:
        return {"attention_bias": False}


class Gemma2(Gemma):
    """Gemma 2: every second layer is local, logits are capped, branches have a second norm."""

    name = "gemma2"
    architectures = ("Gemma2ForCausalLM",)
    model_type = "gemma2"
    defaults: ClassVar[Mapping[str, int]] = {
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    }
    norms: ClassVar[Mapping[str, tuple[str, str]]] = {
        "input_layernorm.weight": ("layers/attention_norm/scale", "D -> D"),
        "post_attention_layernorm.weight": ("layers/post_attention_norm/scale", "D -> D"),
        "pre_feedforward_layernorm.weight": ("layers/mlp_norm/scale", "D -> D"),
        "post_feedforward_layernorm.weight": ("layers/post_mlp_norm/scale", "D -> D"),
    }
    caps: ClassVar[Mapping[str, float | None]] = {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }

    def activation(self, values: Mapping[str, Any], where: str) -> str:
        return read.activation(values, "hidden_activation", where, "gelu_tanh")

    def own_fields(self, values: Mapping[str, Any], where: str, num_layers: int) -> dict[str, Any]:
        local = read.local_layers(values, where, num_layers)
        if local is None:
            period = self.global_every(values, where)
            local = [(layer + 1) % period != 0 for layer in range(num_layers)]
        window = read.whole_number(values, "sliding_window", where, 4096) if any(local) else None
        fields = {
            "post_norms": True,
            "query_scale": read.number(values, "query_pre_attn_scalar", where, 256) ** -0.5,
            **read.local_layer_fields(local, window),
        }
        for key, default in self.caps.items():
            if values.get(key, default) is not None:
                fields[_CAPS[key]] = read.number(values, key, where, default)
        return fields

    def global_every(self, values: Mapping[str, Any], where: str) -> int:
        """The distance from one global layer to the next, if no list of layers says it."""
        return 2

    def own_keys(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            **super().own_keys(config),
            "hidden_activation": read.ACTIVATION_NAMES[config.activation],
            "query_pre_attn_scalar": round(config.scale**-2),
            **{key: getattr(config, field) for key, field in _CAPS.items()},
            "sliding_window": config.window or 4096,
            "layer_types": [read.LOCAL if local else read.GLOBAL for local in config.local_layers],
        }


class Gemma3(Gemma2):
    """Gemma 3: five local layers for each global one, each kind with its rotary base; head norms.

    From a model with vision, only the language model is read.
    """

    name = "gemma3"
    architectures = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
    model_type = "gemma3_text"
    other_model_types = ("gemma3",)
    defaults: ClassVar[Mapping[str, int]] = {**Gemma2.defaults, "vocab_size": 262_208}
    caps: ClassVar[Mapping[str, float | None]] = {"final_logit_softcapping": None}

    def decoder_config(self, values: Mapping[str, Any], where: str) -> DecoderConfig:
        text = values.get("text_config", values)
        if not isinstance(text, Mapping):
            raise CalmError(f"{where}: text_config is {text!r}; it must be an object")
        if text is not values:
            tied = {"tie_word_embeddings": values.get("tie_word_embeddings", True)}
            return self.decoder_config({**text, **tied}, f"{where} text_config")
        # transformers reads this key but does not apply it.
        read.refuse(values, where, "attn_logit_softcapping", None)
        return super().decoder_config(values, where)

    def own_fields(self, values: Mapping[str, Any], where: str, num_layers: int) -> dict[str, Any]:
        return {"qk_norm": "rms", **super().own_fields(values, where, num_layers)}

    def global_every(self, values: Mapping[str, Any], where: str) -> int:
        return read.whole_number(values, "sliding_window_pattern", where, 6)

    def rope_fields(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        base, scaling = read.rope(values, where, read.GLOBAL)
        local_base, local_scaling = read.rope(values, where, read.LOCAL)
        fields = {"rope_base": base, "rope_scaling": scaling}
        if (local_base, local_scaling) == (base, scaling):
            return fields
        if local_scaling is not None:
            raise CalmError(
                f"{where}: rope scaling of {read.LOCAL} is {local_scaling}; it must be none, or "
                f"equal to that of {read.GLOBAL}, {scaling}"
            )
        return {**fields, "local_rope_base": local_base}

    def own_keys(self, config: DecoderConfig) -> dict[str, Any]:
        everywhere = local = read.rope_keys(config.rope_base, config.rope_scaling)
        if config.local_rope_base is not None:
            local = read.rope_keys(config.local_rope_base, None)
        ropes = {read.GLOBAL: everywhere, read.LOCAL: local}
        return {
            **super().own_keys(config),
            "rope_parameters": {kind: keys["rope_parameters"] for kind, keys in ropes.items()},
            "rope_local_base_freq": local["rope_theta"],
        }

    def tensor_name(self, name: str) -> str:
        return _WITHIN.sub("model.", name).removeprefix("language_model.")

    def unused(self, config: DecoderConfig) -> tuple[Unused, ...]:
        eyes = Unused(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
        return (*super().unused(config), eyes)
