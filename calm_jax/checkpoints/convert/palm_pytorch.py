"""PaLM re-created in PyTorch: PaLM-pytorch and PaLM-rlhf-pytorch, and weights trained with them.

A layer's `fused_attn_ff_proj` [N·H + 2H + 2F, D] holds query, key, value, up, gate in this order.
Norms are LayerNorms without bias, and neither embeddings nor logits are scaled.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from calm_jax.checkpoints.convert.family import Family, Reading
from calm_jax.checkpoints.convert.table import Rule, Slice, Unused, rule
from calm_jax.checkpoints.convert.without_config import number, shape_of, shown_norm_offset
from calm_jax.checkpoints.sources.source import Source, Tensor
from calm_jax.errors import CalmError
from calm_jax.models import DecoderConfig
from calm_jax.models.rotary import rope_frequencies, xpos_scale

ROPE_BASE, XPOS_SCALE_BASE = 10_000.0, 512.0
FREQUENCIES, DECAY = "rotary_emb.inv_freq", "rotary_emb.scale"


class PalmPytorch(Family):
    """PaLM-pytorch (`1.fn.…`), PaLM-rlhf-pytorch (`layers.0.fn.…`), conceptofmind's models."""

    name = "palm_pytorch"
    options: ClassVar[Mapping[str, str]] = {
        "norm_offset": "added to every stored gamma: 0.0, or 1.0 for models trained with "
        "PaLM-rlhf-pytorch of 2025-01-06 and later (default: 0.0 if gammas average about 1, 1.0 "
        "if they average about 0; otherwise it must be given)",
        "xpos": "whether positions decay as in xPos (default: whether rotary_emb.scale is stored; "
        "without rotary buffers True for PaLM-rlhf-pytorch, False for PaLM-pytorch)",
        "xpos_scale_base": "scale base of xPos, in tokens (default 512)",
        "query_scale": "factor on queries (default: head width to the power of -1/2; 8.0 for "
        "models with q_scale trained with PaLM-rlhf-pytorch before 2023-03-16)",
    }

    def recognises(self, source: Source) -> bool:
        return any(name.endswith(".fn.fused_attn_ff_proj.weight") for name in source.tensors)

    def read(
        self,
        source: Source,
        *,
        norm_offset: float | None = None,
        xpos: bool | None = None,
        xpos_scale_base: float | None = None,
        query_scale: float | None = None,
    ) -> Reading:
        tensors, where = source.tensors, str(source.path)
        names, num_layers = _names(tensors)
        offset, warnings = shown_norm_offset(tensors, ".fn.norm.gamma", norm_offset, 0.0, where)
        config = dataclasses.replace(
            _config(tensors, names, num_layers, where),
            norm_offset=offset,
            xpos_scale_base=_xpos(tensors, names, xpos, xpos_scale_base, where),
            query_scale=None if query_scale is None else number("query_scale", query_scale),
        )
        _check_buffers(tensors, config.head_dim, where)
        return Reading(config, rules(config, names), tensors, unused(names), warnings)


@dataclasses.dataclass(frozen=True)
class Names:
    """How one of the programs names tensors; `layers` precedes a layer's number."""

    embedding: str
    layers: str
    first_layer: int
    down: str
    final_norm: str
    head: str

    @property
    def layer(self) -> str:
        """The start of a layer's names, as a `Rule` takes it."""
        return self.layers + "{layer}.fn."

    @property
    def first(self) -> str:
        """The start of the first layer's names."""
        return self.layer.format(layer=self.first_layer)


def rules(config: DecoderConfig, names: Names) -> tuple[Rule, ...]:
    """The table for a model whose tensors have these names."""
    slices = {
        "norm.gamma": [Slice("layers/attention_norm/scale", "D -> D")],
        "fused_attn_ff_proj.weight": [
            Slice("layers/attention/query", "(N H) D -> D N H"),
            Slice("layers/attention/key", "(K H) D -> D K H"),
            Slice("layers/attention/value", "(K H) D -> D K H"),
            Slice("layers/mlp/up", "F D -> D F"),
            Slice("layers/mlp/gate", "F D -> D F"),
        ],
        "attn_out.weight": [Slice("layers/attention/output", "D (N H) -> N H D")],
        names.down: [Slice("layers/mlp/down", "D F -> F D")],
    }
    if config.qk_norm:
        slices["q_scale"] = [Slice("layers/attention/query_norm", "H -> H")]
        slices["k_scale"] = [Slice("layers/attention/key_norm", "H -> H")]
    return (
        rule(names.embedding, "embedding", "V D -> V D"),
        *(
            Rule(names.layer + name, tuple(held), first_layer=names.first_layer)
            for name, held in slices.items()
        ),
        rule(names.final_norm + "gamma", "final_norm/scale", "D -> D"),
    )


def unused(names: Names) -> tuple[Unused, ...]:
    """Other tensors in the files: buffers, and the embedding a second time as the head."""
    layer = re.escape(names.layers) + r"\d+\.fn\."
    return (
        Unused(layer + r"norm\.beta", "zero"),
        Unused(re.escape(names.final_norm) + "beta", "zero"),
        Unused(layer + f"({re.escape(FREQUENCIES)}|{re.escape(DECAY)})"),
        Unused(re.escape(names.head), "same", names.embedding),
    )


def _names(tensors: Mapping[str, Tensor]) -> tuple[Names, int]:
    """The names of the program that wrote the tensors, and the number of layers."""
    # PaLM-pytorch numbers the modules of a sequence: embedding, layers, norm, head.
    in_sequence = any(re.match(r"\d+\.fn\.", name) for name in tensors)
    layers, first_layer = ("", 1) if in_sequence else ("layers.", 0)
    pattern = re.escape(layers) + r"(\d+)\.fn\."
    numbers = [int(found[1]) for name in tensors if (found := re.match(pattern, name))]
    last = max(numbers, default=first_layer)
    # ff_out is also a sequence; later versions put a dropout before its matrix.
    without_dropout = f"{layers}{first_layer}.fn.ff_out.1.weight" in tensors
    down = "ff_out.1.weight" if without_dropout else "ff_out.2.weight"
    final_norm = f"{last + 1}." if in_sequence else "norm."
    embedding, head = ("0", str(last + 2)) if in_sequence else ("token_emb", "to_logits")
    tied = [f"{embedding}.weight", f"{head}.weight"]
    if tied[0] not in tensors and tied[1] in tensors:
        tied.reverse()  # safetensors keeps one name of a tensor that has two
    return Names(tied[0], layers, first_layer, down, final_norm, tied[1]), last - first_layer + 1


def _config(
    tensors: Mapping[str, Tensor], names: Names, num_layers: int, where: str
) -> DecoderConfig:
    fused, attention, down = (
        names.first + name for name in ("fused_attn_ff_proj.weight", "attn_out.weight", names.down)
    )
    vocab_size, embed_dim = shape_of(tensors, names.embedding, 2, where)
    rows = shape_of(tensors, fused, 2, where)[0]
    heads_width = shape_of(tensors, attention, 2, where)[1]
    mlp_dim = shape_of(tensors, down, 2, where)[1]
    head_dim, odd = divmod(rows - heads_width - 2 * mlp_dim, 2)
    if odd or head_dim < 1 or heads_width % head_dim:
        raise CalmError(
            f"{where}: {fused} has {rows} rows, {attention} {heads_width} columns and {down} "
            f"{mlp_dim}; with N heads of H features these must be N·H + 2H + 2F, N·H and F"
        )
    return DecoderConfig.palm(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=heads_width // head_dim,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        norm="layer",
        norm_eps=1e-5,
        qk_norm="l2" if names.first + "q_scale" in tensors else None,
        rope_base=ROPE_BASE,
        logit_scale=1.0,
    )


def _xpos(
    tensors: Mapping[str, Tensor],
    names: Names,
    xpos: bool | None,
    scale_base: float | None,
    where: str,
) -> float | None:
    """The scale base of xPos in tokens, or None for plain rotary positions."""
    stored = {
        ending: any(name.endswith(ending) for name in tensors) for ending in (FREQUENCIES, DECAY)
    }
    if xpos is None:
        xpos = stored[DECAY] if stored[FREQUENCIES] else names.layers != ""
    if not isinstance(xpos, bool):
        raise CalmError(f"xpos is {xpos!r}; it must be True or False")
    if xpos and stored[FREQUENCIES] and not stored[DECAY]:
        raise CalmError(f"{where}: xpos is True, but there is {FREQUENCIES} without {DECAY}")
    if not xpos:
        if scale_base is not None:
            raise CalmError(f"{where}: xpos_scale_base is {scale_base!r}, but xpos is False")
        return None
    found = number("xpos_scale_base", XPOS_SCALE_BASE if scale_base is None else scale_base)
    if found <= 0:
        raise CalmError(f"xpos_scale_base is {found}; it must be more than 0")
    return found


def _check_buffers(tensors: Mapping[str, Tensor], head_dim: int, where: str) -> None:
    """Raises `CalmError` if stored rotary frequencies or decays differ from those we compute."""
    one_token = xpos_scale(jnp.ones((1, 1)), head_dim, scale_base=1.0)[0, 0, 0]
    expected = {
        FREQUENCIES: np.asarray(rope_frequencies(head_dim, ROPE_BASE)),
        DECAY: np.asarray(one_token[: head_dim // 2]),
    }
    for name, tensor in tensors.items():
        for ending, values in expected.items():
            if not name.endswith(ending):
                continue
            found = np.asarray(tensor[...], np.float32)
            # Models saved in half precision have rounded values here.
            if found.shape != values.shape or not np.allclose(found, values, rtol=1e-2):
                raise CalmError(
                    f"{where}: tensor {name} starts with {found.reshape(-1)[:3]}, this family's "
                    f"rotary positions with {values[:3]}"
                )
