"""GPT-J as transformers publishes it.

Parallel blocks under one LayerNorm with bias, an MLP without gate and with biases, interleaved
rotary positions on the first features of each head, and an output head with a bias.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from calm_jax.checkpoints.convert import huggingface_config as read
from calm_jax.checkpoints.convert.family import HuggingFaceFamily
from calm_jax.checkpoints.convert.table import Rule, Unused, rule
from calm_jax.models import DecoderConfig

# Tensors below "transformer.h.{layer}".
_LAYER = {
    "ln_1.weight": ("layers/attention_norm/scale", "D -> D"),
    "ln_1.bias": ("layers/attention_norm/bias", "D -> D"),
    "attn.q_proj.weight": ("layers/attention/query", "(N H) D -> D N H"),
    "attn.k_proj.weight": ("layers/attention/key", "(K H) D -> D K H"),
    "attn.v_proj.weight": ("layers/attention/value", "(K H) D -> D K H"),
    "attn.out_proj.weight": ("layers/attention/output", "D (N H) -> N H D"),
    "mlp.fc_in.weight": ("layers/mlp/up", "F D -> D F"),
    "mlp.fc_in.bias": ("layers/mlp/up_bias", "F -> F"),
    "mlp.fc_out.weight": ("layers/mlp/down", "D F -> F D"),
    "mlp.fc_out.bias": ("layers/mlp/down_bias", "D -> D"),
}
# transformers prefers these names to the family's own.
_OTHER_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}


class GptJ(HuggingFaceFamily):
    """GPT-J."""

    name = "gptj"
    architectures = ("GPTJForCausalLM",)
    model_type = "gptj"
    # The values of absent keys of config.json (transformers' GPTJConfig).
    defaults: ClassVar[Mapping[str, int]] = {
        "vocab_size": 50_400,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "rotary_dim": 64,
    }

    def decoder_config(self, values: Mapping[str, Any], where: str) -> DecoderConfig:
        others = {own: values[name] for name, own in _OTHER_NAMES.items() if name in values}
        values = {**values, **others}
        sizes = {
            key: read.whole_number(values, key, where, default)
            for key, default in self.defaults.items()
        }
        width, heads = sizes["n_embd"], sizes["n_head"]
        read.refuse(values, where, "tie_word_embeddings", False)
        # The rotary base is a constant of the family.
        read.refuse(values, where, "rope_theta", None, 10_000)
        read.refuse(values, where, "rope_scaling", None)
        read.refuse(values, where, "rope_parameters", None)
        return DecoderConfig(
            vocab_size=sizes["vocab_size"],
            embed_dim=width,
            num_layers=sizes["n_layer"],
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=read.quotient(sizes, "n_embd", "n_head", where),
            mlp_dim=read.optional_whole_number(values, "n_inner", where) or 4 * width,
            block="parallel",
            gated_mlp=False,
            activation=read.activation(values, "activation_function", where, "gelu_tanh"),
            norm="layer",
            norm_bias=True,
            norm_eps=read.number(values, "layer_norm_epsilon", where, 1e-5),
            mlp_bias=True,
            head_bias=True,
            rope="interleaved",
            rope_dim=sizes["rotary_dim"],
            tied_head=False,
        )

    def huggingface_config(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "architectures": [self.architectures[0]],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "n_embd": config.embed_dim,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": config.mlp_dim,
            "rotary_dim": config.head_dim if config.rope_dim is None else config.rope_dim,
            "activation_function": read.ACTIVATION_NAMES[config.activation],
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": False,
        }

    def rules(self, config: DecoderConfig) -> tuple[Rule, ...]:
        return (
            rule("transformer.wte.weight", "embedding", "V D -> V D"),
            *(rule(f"transformer.h.{{layer}}.{name}", *ours) for name, ours in _LAYER.items()),
            rule("transformer.ln_f.weight", "final_norm/scale", "D -> D"),
            rule("transformer.ln_f.bias", "final_norm/bias", "D -> D"),
            rule("lm_head.weight", "head", "V D -> D V"),
            rule("lm_head.bias", "head_bias", "V -> V"),
        )

    def unused(self, config: DecoderConfig) -> tuple[Unused, ...]:
        # Causal masks, which older versions of transformers saved.
        return (Unused(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),)
