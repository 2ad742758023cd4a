"""Which families there are, and which one a source is of."""

import functools
import importlib

from calm_jax.checkpoints.convert.family import Family
from calm_jax.checkpoints.convert.huggingface_config import refuse, refuse_experts
from calm_jax.checkpoints.sources.source import Source
from calm_jax.errors import CalmError

# The module of each family beside this one, and its classes there.
_CLASSES = {
    "llama": ("Llama", "Mistral", "Qwen2", "Qwen3"),
    "gemma": ("Gemma", "Gemma2", "Gemma3"),
    "gemma_deepmind": ("GemmaDeepMind",),
    "gptj": ("GptJ",),
    "falcon": ("Falcon",),
    "cohere": ("Cohere",),
    "palm": ("Palm",),
    "palm_pytorch": ("PalmPytorch",),
}


@functools.cache
def families() -> dict[str, Family]:
    """Every family by its name."""
    found = {}
    for module, classes in _CLASSES.items():
        loaded = importlib.import_module(f"calm_jax.checkpoints.convert.{module}")
        for name in classes:
            family = getattr(loaded, name)()
            found[family.name] = family
    return found


def find_family(source: Source, name: str = "auto") -> Family:
    """The family called `name`, or with "auto" the one that recognises the source.

    Raises:
        CalmError: an unknown name; a source that another family recognises, or with "auto" none:
            the message says what the source calls itself, and what of it nothing here computes.
    """
    if name != "auto" and name not in families():
        raise CalmError(f"--format={name} is unknown; known are auto, {', '.join(families())}")
    for family in families().values():
        if family.recognises(source):
            if name not in ("auto", family.name):
                raise CalmError(f"{source.place} is of the family {family.name}, not {name}")
            return family
    if name != "auto" and not (source.config or {}).get("architectures"):
        return families()[name]
    if source.config is not None:
        where = f"{source.place / 'config.json'} of {_architecture(source)}"
        refuse_experts(source.config, where)
        refuse(source.config, where, "is_encoder_decoder", False)
    raise CalmError(f"{source.place}: {_what_it_is(source)}; supported are {', '.join(families())}")


def _architecture(source: Source) -> str:
    return (source.config.get("architectures") or ["no architecture"])[0]


def _what_it_is(source: Source) -> str:
    if source.config is not None:
        said = _architecture(source)
        if any(said in getattr(family, "architectures", ()) for family in families().values()):
            said += f" of model_type {source.config.get('model_type')!r}"
        return f"config.json says {said}, a family that is not supported"
    names = sorted(source.tensors)
    return f"no known family has tensors like {names[0] if names else 'none at all'}"
