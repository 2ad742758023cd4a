"""Gemma 1, 2 and 3 (text) as transformers publishes them, and the text part of seeing Gemma 3.

All norms are zero-centred, the residual stream starts as the embedding times sqrt(width), the head
is the embedding. The name `post_attention_layernorm` means two things: in Gemma 1 the norm before
the MLP, as in Llama; in Gemma 2 and 3 the one on the attention's result.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from calm_jax.checkpoints.convert import huggingface_config as read
from calm_jax.checkpoints.convert.family import HuggingFaceFamily
from calm_jax.checkpoints.convert.table import Rule, Unused, rule
from calm_jax.checkpoints.sources.source import Source, Tensor
from calm_jax.errors import CalmError
from calm_jax.models import DecoderConfig

_CAPS = {
    "attn_logit_softcapping": "attention_logit_cap",
    "final_logit_softcapping": "final_logit_cap",
}
# The language model within a model that sees, and its head.
_WITHIN = re.compile(r"^(model\.language_model|language_model\.model)\.")


class Gemma(HuggingFaceFamily):
    """Gemma 1: every layer sees everything, logits are not capped, no second norms."""

    name = "gemma"
    architectures = ("GemmaForCausalLM",)
    model_type = "gemma"
    activation_key: ClassVar[str] = "hidden_act"
    # What a config.json that lacks a key means (transformers' GemmaConfig).
    defaults: ClassVar[Mapping[str, int]] = {
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
    }
    norms: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
    }

    def decoder_config(self, values: Mapping[str, Any], where: str) -> DecoderConfig:
        read.refuse(values, where, "attention_bias", False)
        read.refuse(values, where, "use_bidirectional_attention", False, None)
        sizes = {
            read.SIZES[key]: read.whole_number(values, key, where, default)
            for key, default in self.defaults.items()
        }
        return DecoderConfig.gemma(
            **sizes,
            norm_eps=read.number(values, "rms_norm_eps", where, 1e-6),
            activation=self.activation(values, where),
            tied_head=read.boolean(values, "tie_word_embeddings", where, True),
            **self.attention_fields(values, where, sizes),
        )

    def activation(self, values: Mapping[str, Any], where: str) -> str:
        # Gemma 1 was published as "gelu" and trained with the tanh form.
        if values.get(self.activation_key) == "gelu":
            return "gelu_tanh"
        return read.activation(values, self.activation_key, where, "gelu_tanh")

    def attention_fields(
        self, values: Mapping[str, Any], where: str, sizes: Mapping[str, int]
    ) -> dict[str, Any]:
        """`DecoderConfig` fields in which the generations differ."""
        return self.rope_fields(values, where)

    def rope_fields(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        base, scaling = read.rope(values, where)
        return {"rope_base": base, "rope_scaling": scaling}

    def huggingface_config(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "architectures": [self.architectures[0]],
            "model_type": self.model_type,
            **{key: getattr(config, field) for key, field in read.SIZES.items()},
            self.activation_key: read.ACTIVATION_NAMES[config.activation],
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tied_head,
            "attention_bias": False,
            **self.attention_keys(config),
        }

    def attention_keys(self, config: DecoderConfig) -> dict[str, Any]:
        """The inverse of `attention_fields`."""
        return {"rope_parameters": self.rope_keys(config)}

    def rope_keys(self, config: DecoderConfig) -> dict[str, Any]:
        return read.rope_parameters(config.rope_base, config.rope_scaling)

    def rules(self, config: DecoderConfig) -> tuple[Rule, ...]:
        layer, attention, mlp = "model.layers.{layer}", "layers/attention", "layers/mlp"
        head_norms = {"q_norm": "query_norm", "k_norm": "key_norm"} if config.qk_norm else {}
        head = (rule("lm_head.weight", "head", "V D -> D V"),)
        return (
            rule("model.embed_tokens.weight", "embedding", "V D -> V D"),
            rule(f"{layer}.self_attn.q_proj.weight", f"{attention}/query", "(N H) D -> D N H"),
            rule(f"{layer}.self_attn.k_proj.weight", f"{attention}/key", "(K H) D -> D K H"),
            rule(f"{layer}.self_attn.v_proj.weight", f"{attention}/value", "(K H) D -> D K H"),
            rule(f"{layer}.self_attn.o_proj.weight", f"{attention}/output", "D (N H) -> N H D"),
            *(
                rule(f"{layer}.self_attn.{theirs}.weight", f"{attention}/{ours}/scale", "H -> H")
                for theirs, ours in head_norms.items()
            ),
            rule(f"{layer}.mlp.gate_proj.weight", f"{mlp}/gate", "F D -> D F"),
            rule(f"{layer}.mlp.up_proj.weight", f"{mlp}/up", "F D -> D F"),
            rule(f"{layer}.mlp.down_proj.weight", f"{mlp}/down", "D F -> F D"),
            *(
                rule(f"{layer}.{theirs}.weight", f"layers/{ours}/scale", "D -> D")
                for theirs, ours in self.norms.items()
            ),
            rule("model.norm.weight", "final_norm/scale", "D -> D"),
            *(() if config.tied_head else head),
        )

    def unused(self, config: DecoderConfig) -> tuple[Unused, ...]:
        buffers = Unused(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
        if not config.tied_head:
            return (buffers,)
        return (buffers, Unused(r"lm_head\.weight", "same", "model.embed_tokens.weight"))


class Gemma2(Gemma):
    """Gemma 2: every second layer is local, logits are capped, each branch has a second norm."""

    name = "gemma2"
    architectures = ("Gemma2ForCausalLM",)
    model_type = "gemma2"
    activation_key = "hidden_activation"
    defaults: ClassVar[Mapping[str, int]] = {
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    }
    norms: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "post_mlp_norm",
    }
    caps: ClassVar[Mapping[str, float | None]] = {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }

    def activation(self, values: Mapping[str, Any], where: str) -> str:
        return read.activation(values, self.activation_key, where, "gelu_tanh")

    def attention_fields(
        self, values: Mapping[str, Any], where: str, sizes: Mapping[str, int]
    ) -> dict[str, Any]:
        local = read.local_layers(values, where, sizes["num_layers"])
        if local is None:
            period = self.global_every(values, where)
            local = [(layer + 1) % period != 0 for layer in range(sizes["num_layers"])]
        window = read.whole_number(values, "sliding_window", where, 4096) if any(local) else None
        query_width = read.number(values, "query_pre_attn_scalar", where, 256)
        caps = {
            _CAPS[key]: None
            if values.get(key, default) is None
            else read.number(values, key, where, default)
            for key, default in self.caps.items()
        }
        return {
            "post_norms": True,
            "query_scale": None if query_width == sizes["head_dim"] else query_width**-0.5,
            **caps,
            **read.local_layer_fields(local, window),
            **self.rope_fields(values, where),
        }

    def global_every(self, values: Mapping[str, Any], where: str) -> int:
        """How many layers on from a global one the next stands, where no list says."""
        return 2

    def attention_keys(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "query_pre_attn_scalar": round(config.scale**-2),
            **{key: getattr(config, field) for key, field in _CAPS.items()},
            "sliding_window": config.window or 4096,
            "layer_types": [read.LOCAL if local else read.GLOBAL for local in config.local_layers],
            "rope_parameters": self.rope_keys(config),
        }


class Gemma3(Gemma2):
    """Gemma 3: five local layers to a global one, each with its rotary base; norms on heads.

    Of a model that also sees images, the language model alone is read.
    """

    name = "gemma3"
    architectures = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
    model_type = "gemma3_text"
    defaults: ClassVar[Mapping[str, int]] = {**Gemma2.defaults, "vocab_size": 262_208}
    caps: ClassVar[Mapping[str, float | None]] = {"final_logit_softcapping": None}

    def decoder_config(self, values: Mapping[str, Any], where: str) -> DecoderConfig:
        text = values.get("text_config", values)
        if not isinstance(text, Mapping):
            raise CalmError(f"{where}: text_config is {text!r}; it must be an object")
        if text is not values:
            tied = {"tie_word_embeddings": values.get("tie_word_embeddings", True)}
            return self.decoder_config({**text, **tied}, f"{where} text_config")
        # transformers reads this key and does not apply it.
        read.refuse(values, where, "attn_logit_softcapping", None)
        return super().decoder_config(values, where)

    def attention_fields(
        self, values: Mapping[str, Any], where: str, sizes: Mapping[str, int]
    ) -> dict[str, Any]:
        return {"qk_norm": "rms", **super().attention_fields(values, where, sizes)}

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
                f"{where}: rope scaling of {read.LOCAL} is {local_scaling}; it may only be none, "
                f"or like {read.GLOBAL} in all: {scaling}"
            )
        return {**fields, "local_rope_base": local_base}

    def rope_keys(self, config: DecoderConfig) -> dict[str, Any]:
        everywhere = super().rope_keys(config)
        if config.local_rope_base is None:
            return {read.GLOBAL: everywhere, read.LOCAL: everywhere}
        local = read.rope_parameters(config.local_rope_base, None)
        return {read.GLOBAL: everywhere, read.LOCAL: local}

    def tensors(self, source: Source) -> Mapping[str, Tensor]:
        found = {
            _WITHIN.sub("model.", name).removeprefix("language_model."): tensor
            for name, tensor in source.tensors.items()
        }
        if len(found) < len(source.tensors):
            raise CalmError(f"{source.place} has some tensors twice: in two forms of Gemma 3")
        return found

    def unused(self, config: DecoderConfig) -> tuple[Unused, ...]:
        eyes = Unused(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
        return (*super().unused(config), eyes)
