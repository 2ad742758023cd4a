"""PaLM re-created in PyTorch: PaLM-pytorch and PaLM-rlhf-pytorch, and weights trained with them.

A layer's `fused_attn_ff_proj` [N·H + 2H + 2F, D] holds query, key, value, up, gate in this order.
Norms are LayerNorms without bias, and neither embeddings nor logits are scaled.
"""

import re
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from calm_jax.checkpoints.convert.family import Family, Reading
from calm_jax.checkpoints.convert.table import Part, Rule, Unused, rule
from calm_jax.checkpoints.convert.trees import norm_warnings, number, shape_of
from calm_jax.checkpoints.sources.source import Source, Tensor
from calm_jax.errors import CalmError
from calm_jax.models import DecoderConfig

EMBEDDING, HEAD = "token_emb.weight", "to_logits.weight"
LAYER = "layers.{layer}.fn."
ROPE_BASE = 10_000.0


class PalmPytorch(Family):
    """PaLM-pytorch (`1.fn.…`), PaLM-rlhf-pytorch (`layers.0.fn.…`), conceptofmind's models."""

    name = "palm_pytorch"
    options: ClassVar[Mapping[str, str]] = {
        "norm_offset": "what is added to every stored gamma (default 0.0; 1.0 for models trained "
        "with PaLM-rlhf-pytorch of 2025-01-06 and later, whose tensors look the same)",
        "xpos": "whether rotary positions decay (default: whether rotary_emb.scale is stored; "
        "without such buffers True for PaLM-rlhf-pytorch, False for PaLM-pytorch)",
        "xpos_scale_base": "tokens of that decay (default 512)",
    }

    def recognises(self, source: Source) -> bool:
        return any(name.endswith(".fn.fused_attn_ff_proj.weight") for name in source.tensors)

    def read(
        self,
        source: Source,
        *,
        norm_offset: float = 0.0,
        xpos: bool | None = None,
        xpos_scale_base: float = 512.0,
    ) -> Reading:
        where = str(source.place)
        in_sequence = "0.weight" in source.tensors
        tensors = _named_by_module(source.tensors) if in_sequence else source.tensors
        # A sequence too, with a module more where there was a dropout.
        tensors = {re.sub(r"\.ff_out\.\d+\.", ".ff_out.", k): x for k, x in tensors.items()}
        if xpos is None:
            has_buffers = any(name.endswith("rotary_emb.inv_freq") for name in tensors)
            stored = any(name.endswith("rotary_emb.scale") for name in tensors)
            xpos = stored if has_buffers else not in_sequence
        if not isinstance(xpos, bool):
            raise CalmError(f"xpos is {xpos!r}; it must be True or False")
        base = number("xpos_scale_base", xpos_scale_base) if xpos else None
        config = _config(tensors, number("norm_offset", norm_offset), base, where)
        _check_buffers(tensors, config.head_dim, where)
        warnings = norm_warnings(tensors, ".fn.norm.gamma", config.norm_offset)
        return Reading(config, rules(config), tensors, UNUSED, warnings)


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """The table, in the names of PaLM-rlhf-pytorch."""
    head_norms = (
        rule(LAYER + "q_scale", "layers/attention/query_norm", "H -> H"),
        rule(LAYER + "k_scale", "layers/attention/key_norm", "H -> H"),
    )
    return (
        rule(EMBEDDING, "embedding", "V D -> V D"),
        rule(LAYER + "norm.gamma", "layers/attention_norm/scale", "D -> D"),
        Rule(
            LAYER + "fused_attn_ff_proj.weight",
            (
                Part("layers/attention/query", "(N H) D -> D N H"),
                Part("layers/attention/key", "(K H) D -> D K H"),
                Part("layers/attention/value", "(K H) D -> D K H"),
                Part("layers/mlp/up", "F D -> D F"),
                Part("layers/mlp/gate", "F D -> D F"),
            ),
        ),
        *(head_norms if config.qk_norm else ()),
        rule(LAYER + "attn_out.weight", "layers/attention/output", "D (N H) -> N H D"),
        rule(LAYER + "ff_out.weight", "layers/mlp/down", "D F -> F D"),
        rule("norm.gamma", "final_norm/scale", "D -> D"),
    )


UNUSED = (
    Unused(r"(layers\.\d+\.fn\.)?norm\.beta", "zero"),
    Unused(r"layers\.\d+\.fn\.rotary_emb\.(inv_freq|scale)"),
    Unused(r"to_logits\.weight", "same", EMBEDDING),
)


def _named_by_module(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PaLM-pytorch numbers the modules of a sequence: embedding, layers, norm, head."""
    last = max(int(found[1]) for name in tensors if (found := re.match(r"(\d+)\.", name)))
    layers = [int(found[1]) for name in tensors if (found := re.match(r"(\d+)\.fn\.", name))]
    norm = max(layers) + 1
    starts = {"0.": "token_emb.", f"{norm}.": "norm.", f"{last}.": "to_logits."}
    starts |= {f"{layer}.": f"layers.{layer - 1}." for layer in layers}
    found = {}
    for name, tensor in tensors.items():
        start = re.match(r"\d+\.|", name)[0]
        found[starts.get(start, start) + name.removeprefix(start)] = tensor
    return found


def _config(
    tensors: Mapping[str, Tensor], norm_offset: float, xpos_scale_base: float | None, where: str
) -> DecoderConfig:
    """The form that the shapes tell."""
    first = LAYER.format(layer=0)
    rows, width = shape_of(tensors, EMBEDDING, 2, where)
    fused = shape_of(tensors, first + "fused_attn_ff_proj.weight", 2, where)[0]
    heads_width = shape_of(tensors, first + "attn_out.weight", 2, where)[1]
    mlp_dim = shape_of(tensors, first + "ff_out.weight", 2, where)[1]
    head_dim, odd = divmod(fused - heads_width - 2 * mlp_dim, 2)
    if odd or head_dim < 1 or heads_width % head_dim:
        raise CalmError(
            f"{where}: {first}fused_attn_ff_proj.weight has {fused} rows, attn_out {heads_width} "
            f"and ff_out {mlp_dim} columns, which no heads make: the first must be "
            "heads + 2 of one head + 2 of ff_out"
        )
    layers = {int(found[1]) for name in tensors if (found := re.match(r"layers\.(\d+)\.", name))}
    return DecoderConfig.palm(
        vocab_size=rows,
        embed_dim=width,
        num_layers=max(layers) + 1,
        num_heads=heads_width // head_dim,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        norm="layer",
        norm_eps=1e-5,
        norm_offset=norm_offset,
        qk_norm="l2" if first + "q_scale" in tensors else None,
        rope_base=ROPE_BASE,
        xpos_scale_base=xpos_scale_base,
        logit_scale=1.0,
    )


def _check_buffers(tensors: Mapping[str, Tensor], head_dim: int, where: str) -> None:
    """Raises `CalmError` when stored rotary frequencies or decays are not those that we compute."""
    pairs = np.arange(0, head_dim, 2, dtype=np.float64)
    expected = {
        "rotary_emb.inv_freq": ROPE_BASE ** (-pairs / head_dim),
        "rotary_emb.scale": (pairs + 0.4 * head_dim) / (1.4 * head_dim),
    }
    for name, tensor in tensors.items():
        for ending, values in expected.items():
            if not name.endswith(ending):
                continue
            found = np.asarray(tensor[...], np.float64)
            # Models saved in half precision have these rounded.
            if found.shape != values.shape or not np.allclose(found, values, rtol=1e-2):
                raise CalmError(
                    f"{where}: tensor {name} starts {found.reshape(-1)[:3]}, not "
                    f"{values[:3]}: other rotary positions than this family's"
                )
