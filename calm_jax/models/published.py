"""Forms of published models, for plans made before there are weights.

A form has every size of a model and no weight: `form:gemma2_9b` in a config's `anchor` or
`augments` stands for the model until a frozen folder does.
"""

import difflib
import os

from calm_jax.errors import CalmError
from calm_jax.models.config import DecoderConfig

FORM = "form:"


def _gemma2(
    width: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int, scale: int
):
    """Gemma 2 (arXiv 2408.00118, Table 1); `scale`: features that queries are scaled by."""
    return DecoderConfig.gemma(
        vocab_size=256_000,
        embed_dim=width,
        mlp_dim=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        query_scale=scale**-0.5,
        post_norms=True,
        window=4096,
        window_pattern=(True, False),
        attention_logit_cap=50.0,
        final_logit_cap=30.0,
        dtype="bfloat16",
    )


def _palm(layers: int, width: int, heads: int) -> DecoderConfig:
    """PaLM (arXiv 2204.02311, Table 1), its vocabulary with the padding it was trained with."""
    return DecoderConfig.palm(
        vocab_size=256_128,
        embed_dim=width,
        mlp_dim=4 * width,
        num_layers=layers,
        num_heads=heads,
        head_dim=256,
        dtype="bfloat16",
    )


FORMS = {
    "gemma2_2b": _gemma2(2304, 9216, 26, 8, 4, 256, 256),
    "gemma2_9b": _gemma2(3584, 14_336, 42, 16, 8, 256, 256),
    "gemma2_27b": _gemma2(4608, 36_864, 46, 32, 16, 128, 144),
    "palm_8b": _palm(32, 4096, 16),
    "palm_62b": _palm(64, 8192, 32),
    "palm_540b": _palm(118, 18_432, 48),
}


def form(place: str) -> DecoderConfig:
    """The form that `place`, "form:NAME", names. Raises `CalmError` for a name that is unknown."""
    name = place.removeprefix(FORM)
    if name not in FORMS:
        near = difflib.get_close_matches(name, FORMS, n=1, cutoff=0)
        raise CalmError(f"{place!r} is no known form; did you mean '{FORM}{near[0]}'?")
    return FORMS[name]


def is_form(place: os.PathLike | str) -> bool:
    """Whether a place of a model is the name of a form."""
    return os.fspath(place).startswith(FORM)
