"""Gemma 1, 2 and 3 (text) as DeepMind publishes them: trees of the `gemma` package, on Orbax.

The package writes the same parameters in four layouts, whose names become those of the first:
nested ("layer_0/attn/q_einsum/w"), flat ("transformer/layer_0/…", each MLP matrix one level deeper,
under "w"), stacked (along a leading axis, all layers at one position in the attention pattern) and
Kauldron (nested, below "params", together with the training state).
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from calm_jax.checkpoints.convert import huggingface_config as read
from calm_jax.checkpoints.convert.family import Family, Reading
from calm_jax.checkpoints.convert.table import Rule, Slice, Unused, rule
from calm_jax.checkpoints.convert.without_config import shape_of
from calm_jax.checkpoints.sources.layers import unstack
from calm_jax.checkpoints.sources.source import Source, Tensor
from calm_jax.errors import CalmError
from calm_jax.models import DecoderConfig
from calm_jax.models.config import RopeScaling

# Facts that a tree does not show, by generation, with the values of most sizes.
_HIDDEN: dict[int, dict[str, float]] = {
    1: {},
    2: {"window": 4096, "attention_logit_cap": 50.0, "final_logit_cap": 30.0},
    3: {"window": 512, "attention_logit_cap": 0.0, "final_logit_cap": 0.0, "rope_factor": 1.0},
}
_PATTERNS = {1: (False,), 2: (True, False), 3: (True,) * 5 + (False,)}  # local layers
_LONG = {"window": 1024, "rope_factor": 8.0}
# The published sizes by generation, layers and width, with the values that differ from `_HIDDEN`.
_PUBLISHED: dict[tuple[int, int, int], dict[str, float]] = {
    (1, 18, 2048): {},
    (1, 28, 3072): {},
    (2, 26, 2304): {},
    (2, 42, 3584): {},
    (2, 46, 4608): {"query_scale": 144**-0.5},
    (3, 18, 640): {},
    (3, 26, 1152): {},
    (3, 34, 2560): _LONG,
    (3, 48, 3840): _LONG,
    (3, 62, 5376): {**_LONG, "query_scale": 168**-0.5},
}


class GemmaDeepMind(Family):
    """Gemma 1, 2 and 3 (text) in the trees of the `gemma` package, without vision parts."""

    name = "gemma_deepmind"
    options: ClassVar[Mapping[str, str]] = {
        "window": "tokens that a local layer sees, itself included",
        "query_scale": "factor on queries before the softmax",
        "attention_logit_cap": "soft cap of attention logits, 0 for none",
        "final_logit_cap": "soft cap of the model's logits, 0 for none",
        "rope_factor": "divisor of positions in Gemma 3's global layers (these five options are "
        "needed only for sizes that were never published)",
        "gating": "layout of gating_einsum, plain [2, D, F] or transposed [2, F, D]; needed only "
        "if width D and MLP width F are equal",
    }

    def recognises(self, source: Source) -> bool:
        return any(name.endswith("embedder/input_embedding") for name in source.tensors) and any(
            name.endswith("/attn/attn_vec_einsum/w") for name in source.tensors
        )

    def read(self, source: Source, **options: Any) -> Reading:
        where = str(source.path)
        tensors = _nested(source.tensors, where)
        config = _config(tensors, options, where)
        transposed = _is_transposed(tensors, config, options.get("gating"), where)
        fused = "layer_0/attn/qkv_einsum/w" in tensors
        return Reading(config, _rules(config, transposed, fused), tensors, _UNUSED)


def _nested(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors, in any of the layouts, by the names of the nested layout."""
    short = {_short(name): tensor for name, tensor in tensors.items()}
    if len(short) < len(tensors):
        raise CalmError(f"{where} has some tensors twice, in two layouts of Gemma's trees")
    stacked = {name: m for name in short if (m := _STACKED.fullmatch(name)) and short[name].shape}
    period = 1 + max((int(match[1]) for match in stacked.values()), default=0)
    nested = {}
    for name, tensor in short.items():
        if name not in stacked:
            nested[name] = tensor
            continue
        position, rest = stacked[name].groups()
        for repeat, layer in enumerate(unstack(tensor, 0, group_bytes=0)):  # each is read alone
            nested[f"layer_{repeat * period + int(position)}/{rest}"] = layer
    return nested


_PREFIXES = re.compile(r"^(rlx_networks/policy_network/|params/|transformer/)*")
_STACKED = re.compile(r"stacked_layers/attention_type_(\d+)/(.+)")


def _short(name: str) -> str:
    return re.sub(r"(/mlp/\w+)/w$", r"\1", _PREFIXES.sub("", name))


def _config(tensors: Mapping[str, Tensor], options: Mapping[str, Any], where: str) -> DecoderConfig:
    """The config that the shapes, the published sizes and the options give."""
    vocab_size, embed_dim = shape_of(tensors, "embedder/input_embedding", 2, where)
    num_heads, head_dim, _ = shape_of(tensors, "layer_0/attn/attn_vec_einsum/w", 3, where)
    num_kv_heads = num_heads
    if "layer_0/attn/qkv_einsum/w" not in tensors:
        num_kv_heads = shape_of(tensors, "layer_0/attn/kv_einsum/w", 4, where)[1]
    mlp_dim, _ = shape_of(tensors, "layer_0/mlp/linear", 2, where)
    num_layers = len({m[1] for name in tensors if (m := re.match(r"layer_(\d+)/", name))})
    post_norms = "layer_0/post_attention_norm/scale" in tensors
    qk_norm = "layer_0/attn/_query_norm/scale" in tensors
    generation = 3 if qk_norm else 2 if post_norms else 1

    given = _numbers(options, generation, where)
    published = _PUBLISHED.get((generation, num_layers, embed_dim))
    usual = {} if generation == 1 else {"query_scale": head_dim**-0.5}
    found = usual | _HIDDEN[generation] | (published or {}) | given
    absent = [f"{name}={value:g}" for name, value in found.items() if name not in given]
    if published is None and absent:
        raise CalmError(
            f"{where}: no Gemma {generation} of {num_layers} layers of width {embed_dim} was "
            "published, and the tree does not show everything; give these options, whose values "
            f"here are those of other sizes: {' '.join(absent)}"
        )
    pattern = _PATTERNS[generation]
    layers = [pattern[layer % len(pattern)] for layer in range(num_layers)]
    fields = read.local_layer_fields(layers, found.get("window"))
    if generation == 3:
        fields |= {"qk_norm": "rms", "rope_base": 1e6, "local_rope_base": 1e4}
    if found.get("rope_factor", 1.0) != 1.0:
        fields["rope_scaling"] = RopeScaling("linear", found["rope_factor"])
    return DecoderConfig.gemma(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        post_norms=post_norms,
        query_scale=found.get("query_scale"),
        attention_logit_cap=found.get("attention_logit_cap") or None,
        final_logit_cap=found.get("final_logit_cap") or None,
        **fields,
    )


def _numbers(options: Mapping[str, Any], generation: int, where: str) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    for name, value in options.items():
        if name == "gating" or value is None:
            continue
        if name != "query_scale" and name not in _HIDDEN[generation]:
            raise CalmError(f"option {name}={value}: {where} is Gemma {generation}, which has none")
        if name == "window":
            found[name] = read.whole_number(options, name, "options")
        elif name.endswith("_cap") and value == 0:
            found[name] = 0.0
        else:
            found[name] = read.number(options, name, "options")
    return found


def _is_transposed(
    tensors: Mapping[str, Tensor], config: DecoderConfig, gating: str | None, where: str
) -> bool:
    """Whether gating_einsum is [2, F, D] instead of [2, D, F]."""
    name = "layer_0/mlp/gating_einsum"
    shape = shape_of(tensors, name, 3, where)[1:]
    shapes = {
        "plain": (config.embed_dim, config.mlp_dim),
        "transposed": (config.mlp_dim, config.embed_dim),
    }
    fitting = [layout for layout, expected in shapes.items() if shape == expected]
    if gating is None and len(fitting) > 1:
        raise CalmError(
            f"{where}: width and MLP width are both {config.mlp_dim}, so the layout of {name} is "
            "unclear; give the option gating=plain or gating=transposed"
        )
    if gating is not None and gating not in fitting:
        raise CalmError(
            f"option gating={gating}: tensor {name} of {where} ends in {shape}; plain is "
            f"{shapes['plain']}, transposed {shapes['transposed']}"
        )
    return (gating or next(iter(fitting), "plain")) == "transposed"


def _rules(config: DecoderConfig, transposed: bool, fused: bool) -> tuple[Rule, ...]:
    layer, ours = "layer_{layer}", "layers"
    attention = f"{ours}/attention"
    key = Slice(f"{attention}/key", "1 K D H -> D K H")
    value = Slice(f"{attention}/value", "1 K D H -> D K H")
    if fused:
        query = Slice(f"{attention}/query", "1 N D H -> D N H")
        projections = [Rule(f"{layer}/attn/qkv_einsum/w", (query, key, value))]
    else:
        projections = [
            rule(f"{layer}/attn/q_einsum/w", f"{attention}/query", "N D H -> D N H"),
            Rule(f"{layer}/attn/kv_einsum/w", (key, value)),
        ]
    gating = "1 F D -> D F" if transposed else "1 D F -> D F"
    norms = {"pre_attention_norm": "attention_norm", "pre_ffw_norm": "mlp_norm"}
    if config.post_norms:
        norms |= {"post_attention_norm": "post_attention_norm", "post_ffw_norm": "post_mlp_norm"}
    head_norms = {"_query_norm": "query_norm", "_key_norm": "key_norm"} if config.qk_norm else {}
    return (
        rule("embedder/input_embedding", "embedding", "V D -> V D"),
        *projections,
        rule(f"{layer}/attn/attn_vec_einsum/w", f"{attention}/output", "N H D -> N H D"),
        *(
            rule(f"{layer}/attn/{theirs}/scale", f"{attention}/{name}/scale", "H -> H")
            for theirs, name in head_norms.items()
        ),
        Rule(
            f"{layer}/mlp/gating_einsum",
            (Slice(f"{ours}/mlp/gate", gating), Slice(f"{ours}/mlp/up", gating)),
        ),
        rule(f"{layer}/mlp/linear", f"{ours}/mlp/down", "F D -> F D"),
        *(
            rule(f"{layer}/{theirs}/scale", f"{ours}/{name}/scale", "D -> D")
            for theirs, name in norms.items()
        ),
        rule("final_norm/scale", "final_norm/scale", "D -> D"),
    )


# Tensors of models with vision, and of Kauldron's training state.
_UNUSED = (
    Unused(r"(vision_encoder|SigLiPFromPatches_0)/.*"),
    Unused(r"embedder/mm_.*"),
    Unused(r"(collections|opt_state)/.*|step"),
)
