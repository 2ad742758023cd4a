"""Cohere's Command-R as transformers publishes it.

Parallel blocks of attention and SwiGLU under one LayerNorm without biases, interleaved rotary
positions, and scaled logits.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from calm_jax.checkpoints.convert import huggingface_config as read
from calm_jax.checkpoints.convert.llama import Llama, bias_everywhere
from calm_jax.models import DecoderConfig


class Cohere(Llama):
    """Command-R: tensors have Llama's names, and the MLP has no norm of its own."""

    name = "cohere"
    architectures = ("CohereForCausalLM",)
    model_type = "cohere"
    defaults: ClassVar[Mapping[str, int]] = {
        "vocab_size": 256_000,
        "hidden_size": 8192,
        "intermediate_size": 22_528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
    }
    norms: ClassVar[Mapping[str, tuple[str, str]]] = {
        "input_layernorm.weight": ("layers/attention_norm/scale", "D -> D"),
    }
    eps_key = "layer_norm_eps"

    def decoder_config(self, values: Mapping[str, Any], where: str) -> DecoderConfig:
        # Command-R Plus: a LayerNorm with a scale for every feature of every head.
        read.refuse(values, where, "use_qk_norm", False, None)
        rope_base, rope_scaling = read.rope({"rope_theta": 500_000.0, **values}, where)
        return DecoderConfig(
            **self.sizes(values, where),
            block="parallel",
            norm="layer",
            norm_eps=read.number(values, self.eps_key, where, 1e-5),
            activation=read.activation(values, "hidden_act", where, "silu"),
            rope="interleaved",
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            logit_scale=read.number(values, "logit_scale", where, 0.0625),
            tied_head=read.boolean(values, "tie_word_embeddings", where, True),
            **bias_everywhere(values, where),
        )

    def own_keys(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "attention_bias": config.attention_bias,
            "logit_scale": config.logit_scale,
            "use_qk_norm": False,
        }
