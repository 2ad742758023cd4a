"""The known families, and how a source's family is found."""

from collections.abc import Mapping
from typing import Any

from calm_jax.checkpoints.convert import vit
from calm_jax.checkpoints.convert.cohere import Cohere
from calm_jax.checkpoints.convert.falcon import Falcon
from calm_jax.checkpoints.convert.family import Family
from calm_jax.checkpoints.convert.gemma import Gemma, Gemma2, Gemma3
from calm_jax.checkpoints.convert.gemma_deepmind import GemmaDeepMind
from calm_jax.checkpoints.convert.gptj import GptJ
from calm_jax.checkpoints.convert.huggingface_config import refuse, refuse_experts
from calm_jax.checkpoints.convert.llama import Llama, Mistral, Qwen2, Qwen3
from calm_jax.checkpoints.convert.palm import Palm
from calm_jax.checkpoints.convert.palm_pytorch import PalmPytorch
from calm_jax.checkpoints.sources.source import Source
from calm_jax.errors import CalmError

_CLASSES = (
    Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2, Gemma3, GemmaDeepMind, GptJ, Falcon, Cohere, Palm,
    PalmPytorch,
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.name: family() for family in _CLASSES}

# Endings of names in bridges of other programs, which they are, and what they do.
_BRIDGES = {
    ".cross_attention.in_proj_weight": "google-deepmind/calm: its tokens attend to all taps, later "
    "ones and padding too, and it norms the result of the cross-attention",
    ".context_proj.weight": "lucidrains' CALM-pytorch: its tokens attend to all taps, later ones "
    "too, and it gates heads by their queries",
}


def find_family(source: Source, name: str = "auto") -> Family:
    """The family called `name`, or with "auto" the one that recognises the source.

    Raises:
        CalmError: the name is unknown; another family recognises the source; or with "auto", none
            does: the message gives the source's own name for itself, and the key that says it.
    """
    if name != "auto" and name not in FAMILIES:
        raise CalmError(f"--format={name} is unknown; known are auto, {', '.join(FAMILIES)}")
    for family in FAMILIES.values():
        if family.recognises(source):
            if name not in ("auto", family.name):
                raise CalmError(f"{source.path} is of the family {family.name}, not {name}")
            return family
    refuse_bridges(source)
    config = source.config or {}
    if name != "auto" and not (config.get("architectures") or config.get("model_type")):
        return FAMILIES[name]
    if source.config is not None:
        where = f"{source.config_path} of {_name_in(source.config)}"
        if config.get("model_type") == vit.MODEL_TYPE:
            raise CalmError(f"{where} is an image encoder; calm_jax.load_encoder reads it as it is")
        refuse_experts(source.config, where)
        refuse(source.config, where, "is_encoder_decoder", False)
    raise CalmError(f"{source.path}: {_description(source)}; supported are {', '.join(FAMILIES)}")


def refuse_bridges(source: Source) -> None:
    """Raises `CalmError` for bridges of other programs, none of which can be expressed here."""
    for ending, told in _BRIDGES.items():
        if any(name.endswith(ending) for name in source.tensors):
            raise CalmError(f"{source.path} is a bridge of {told}; neither can be expressed here")


def _name_in(config: Mapping[str, Any]) -> str:
    """A config.json's name for its model: the architecture, and the model_type if that decides."""
    architecture, *_ = config.get("architectures") or [None]
    model_type = config.get("model_type")
    if architecture is None:
        return "no architecture" if model_type is None else f"model_type {model_type!r}"
    known = any(
        architecture in getattr(family, "architectures", ()) for family in FAMILIES.values()
    )
    return f"{architecture} of model_type {model_type!r}" if known else architecture


def _description(source: Source) -> str:
    if source.config is not None:
        return f"config.json says {_name_in(source.config)}, a family that is not supported"
    name = min(source.tensors, default="none at all")
    return f"no known family has tensors like {name}"
