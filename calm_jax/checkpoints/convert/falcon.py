"""Falcon 7B and models built like it, as transformers publishes them.

Parallel blocks under one LayerNorm with bias, one key head for all, an MLP without gate; query, key
and value in one matrix.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from calm_jax.checkpoints.convert import huggingface_config as read
from calm_jax.checkpoints.convert.family import HuggingFaceFamily
from calm_jax.checkpoints.convert.table import Rule, Slice, Unused, rule
from calm_jax.models import DecoderConfig

_LAYER = "transformer.h.{layer}"
_QUERY_KEY_VALUE = (
    Slice("layers/attention/query", "(N H) D -> D N H"),
    Slice("layers/attention/key", "(K H) D -> D K H"),
    Slice("layers/attention/value", "(K H) D -> D K H"),
)
# How the 7B is built; for an absent key, transformers' FalconConfig has these values too.
_BUILT_AS = {
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "alibi": False,
    "new_decoder_architecture": False,
}


class Falcon(HuggingFaceFamily):
    """Falcon 7B and models built like it; others are refused."""

    name = "falcon"
    architectures = ("FalconForCausalLM",)
    model_type = "falcon"
    # The values of absent keys of config.json (transformers' FalconConfig).
    defaults: ClassVar[Mapping[str, int]] = {
        "vocab_size": 65_024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
    }

    def decoder_config(self, values: Mapping[str, Any], where: str) -> DecoderConfig:
        for key, value in _BUILT_AS.items():
            read.refuse(values, where, key, value)
        sizes = {
            key: read.whole_number(values, key, where, default)
            for key, default in self.defaults.items()
        }
        width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        rope_base, rope_scaling = read.rope(values, where)
        return DecoderConfig(
            vocab_size=sizes["vocab_size"],
            embed_dim=width,
            num_layers=sizes["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=1,
            head_dim=read.quotient(sizes, "hidden_size", "num_attention_heads", where),
            mlp_dim=read.optional_whole_number(values, "ffn_hidden_size", where) or 4 * width,
            block="parallel",
            gated_mlp=False,
            activation=read.activation(values, "activation", where, "gelu"),
            norm="layer",
            norm_bias=True,
            norm_eps=read.number(values, "layer_norm_epsilon", where, 1e-5),
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            tied_head=read.boolean(values, "tie_word_embeddings", where, True),
        )

    def huggingface_config(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "architectures": [self.architectures[0]],
            "model_type": self.model_type,
            **_BUILT_AS,
            "vocab_size": config.vocab_size,
            "hidden_size": config.embed_dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "ffn_hidden_size": config.mlp_dim,
            "activation": read.ACTIVATION_NAMES[config.activation],
            "layer_norm_epsilon": config.norm_eps,
            **read.rope_keys(config.rope_base, config.rope_scaling),
            "tie_word_embeddings": config.tied_head,
        }

    def rules(self, config: DecoderConfig) -> tuple[Rule, ...]:
        attention, mlp = f"{_LAYER}.self_attention", f"{_LAYER}.mlp"
        head = rule("lm_head.weight", "head", "V D -> D V")
        return (
            rule("transformer.word_embeddings.weight", "embedding", "V D -> V D"),
            rule(f"{_LAYER}.input_layernorm.weight", "layers/attention_norm/scale", "D -> D"),
            rule(f"{_LAYER}.input_layernorm.bias", "layers/attention_norm/bias", "D -> D"),
            Rule(f"{attention}.query_key_value.weight", _QUERY_KEY_VALUE),
            rule(f"{attention}.dense.weight", "layers/attention/output", "D (N H) -> N H D"),
            rule(f"{mlp}.dense_h_to_4h.weight", "layers/mlp/up", "F D -> D F"),
            rule(f"{mlp}.dense_4h_to_h.weight", "layers/mlp/down", "D F -> F D"),
            rule("transformer.ln_f.weight", "final_norm/scale", "D -> D"),
            rule("transformer.ln_f.bias", "final_norm/bias", "D -> D"),
            *(() if config.tied_head else (head,)),
        )

    def unused(self, config: DecoderConfig) -> tuple[Unused, ...]:
        buffers = Unused(r"transformer\.h\.\d+\.self_attention\.rotary_emb\.inv_freq")
        if not config.tied_head:
            return (buffers,)
        return (buffers, Unused(r"lm_head\.weight", "same", "transformer.word_embeddings.weight"))
