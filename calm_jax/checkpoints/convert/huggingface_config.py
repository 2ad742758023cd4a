"""Reads config.json: keys with their types, and what several families of transformers share.

Every function takes the file's `values` and `where`, its name for messages, and raises `CalmError`
naming the file, the key and the value. An absent key has the default; without a default the key is
required.
"""

import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from calm_jax.errors import CalmError
from calm_jax.models.config import RopeScaling

Choice = TypeVar("Choice")

LARGEST = sys.float_info.max
# More layers, features or tokens than any model has, though lists of that length are still small.
MOST = 2**24
LOCAL, GLOBAL = "sliding_attention", "full_attention"
# The fields of `DecoderConfig` by the names that most families use.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
}
# Our name of an activation and those of transformers, the one to write first.
_ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": (
        "gelu_pytorch_tanh",
        "gelu_new",
        "gelu_fast",
        "gelu_accurate",
        "gelu_python_tanh",
    ),
}
ACTIVATION_NAMES = {ours: theirs[0] for ours, theirs in _ACTIVATIONS.items()}


def whole_number(
    values: Mapping[str, Any], key: str, where: str, default: int | None = None, *, least: int = 1
) -> int:
    """A whole number from `least` to `MOST`."""
    value = _get(values, key, where, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
        raise _wrong(where, key, value, f"a whole number of at least {least}, at most {MOST}")
    return value


def optional_whole_number(
    values: Mapping[str, Any], key: str, where: str, default: int | None = None
) -> int | None:
    """A whole number of at least 1; None if the file says null, or lacks the key and there is no
    default."""
    if values.get(key, default) is None:
        return None
    return whole_number(values, key, where, default)


def quotient(values: Mapping[str, Any], key: str, divisor: str, where: str) -> int:
    """One whole number of the file divided by another, without a remainder."""
    whole, parts = whole_number(values, key, where), whole_number(values, divisor, where)
    if whole % parts:
        raise CalmError(f"{where}: {key} {whole} is not a multiple of {divisor} {parts}")
    return whole // parts


def number(values: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A finite number above 0."""
    value = _get(values, key, where, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= LARGEST:
        raise _wrong(where, key, value, "a finite number above 0")
    return float(value)


def boolean(values: Mapping[str, Any], key: str, where: str, default: bool | None = None) -> bool:
    """True or false."""
    value = _get(values, key, where, default)
    if not isinstance(value, bool):
        raise _wrong(where, key, value, "true or false")
    return value


def choice(
    values: Mapping[str, Any],
    key: str,
    where: str,
    meanings: Mapping[str, Choice],
    default: str | None = None,
) -> Choice:
    """The meaning of one of several words; `default` is such a word."""
    value = _get(values, key, where, default)
    if not isinstance(value, str) or value not in meanings:
        raise _wrong(where, key, value, f"one of {', '.join(meanings)}")
    return meanings[value]


def activation(values: Mapping[str, Any], key: str, where: str, default: str) -> str:
    """The `DecoderConfig` name of an activation; null means `default`, which is such a name."""
    if values.get(key) is None:
        return default
    meanings = {name: ours for ours, theirs in _ACTIVATIONS.items() for name in theirs}
    return choice(values, key, where, meanings)


def refuse(values: Mapping[str, Any], where: str, key: str, *allowed: Any) -> None:
    """Refuses a key that changes the computation, unless it is absent or has an `allowed` value."""
    if key in values and values[key] not in allowed:
        raise CalmError(f"{where}: {key} is {reprlib.repr(values[key])}, which is not supported")


def refuse_experts(values: Mapping[str, Any], where: str) -> None:
    """Refuses mixtures of experts by their keys, whatever the name of the architecture."""
    for key in values:
        if "expert" in key or key.startswith("moe"):
            refuse(values, where, key, None, 0, [])
    if isinstance(values.get("text_config"), Mapping):
        refuse_experts(values["text_config"], f"{where} text_config")


def rope(
    values: Mapping[str, Any], where: str, layer_type: str | None = None
) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions.

    transformers 5 writes `rope_parameters`; transformers 4 wrote `rope_theta` and `rope_scaling`.
    `layer_type` asks for Gemma 3's local or global layers: `rope_parameters` has an object for each
    kind; transformers 4 had `rope_local_base_freq` for local ones, without `rope_scaling`.
    """
    found = _mapping(values, "rope_parameters", where)
    scaling = _mapping(values, "rope_scaling", where)
    inside = f"{where}: rope_parameters"
    if layer_type is None:
        refuse(found, inside, LOCAL)
        refuse(found, inside, GLOBAL)
    else:
        for key, value in found.items():
            if key not in (LOCAL, GLOBAL):
                raise _wrong(inside, key, value, f"in {LOCAL} or {GLOBAL}")
        found = _mapping(found, layer_type, inside)
    if layer_type is None and scaling:  # one replaces the other, as in transformers
        found, inside = scaling, f"{where}: rope_scaling"
    elif layer_type == GLOBAL:
        found = {**found, **scaling}
    base_key = "rope_local_base_freq" if layer_type == LOCAL else "rope_theta"
    base_default = 1e6 if layer_type == GLOBAL else 1e4
    if found.get("rope_theta") is None:
        base = number(values, base_key, where, base_default)
    else:
        base = number(found, "rope_theta", where)
    refuse({**values, **found}, where, "partial_rotary_factor", None, 1.0)
    return base, _rope_scaling(found, values, inside)


def rope_parameters(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The inverse of `rope`, as transformers 5 writes it."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if scaling is not None:
        found |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        found |= {
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    return found


def rope_keys(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The same in both forms: transformers 4 silently ignores `rope_parameters`."""
    found = rope_parameters(base, scaling)
    scaled = {key: value for key, value in found.items() if key != "rope_theta"}
    return {
        "rope_parameters": found,
        "rope_theta": base,
        "rope_scaling": None if scaling is None else scaled,
    }


def local_layers(values: Mapping[str, Any], where: str, num_layers: int) -> list[bool] | None:
    """For each layer of `layer_types`, whether it is local; None if there is no such list."""
    types = values.get("layer_types")
    if types is None:
        return None
    is_complete = isinstance(types, list) and len(types) == num_layers
    if not is_complete or not all(kind in (LOCAL, GLOBAL) for kind in types):
        needed = f"{LOCAL} or {GLOBAL} for each of {num_layers} layers"
        raise _wrong(where, "layer_types", types, needed)
    return [kind == LOCAL for kind in types]


def local_layer_fields(local: Sequence[bool], window: int | None) -> dict[str, Any]:
    """`DecoderConfig` fields of a model with these `local` layers, with the shortest pattern.

    >>> local_layer_fields([True, False, True], 8)
    {'window': 8, 'window_pattern': (True, False)}
    """
    if not any(local):
        return {}
    period = next(
        size
        for size in range(1, len(local) + 1)
        if all(here == local[layer % size] for layer, here in enumerate(local))
    )
    return {"window": window, "window_pattern": tuple(local[:period])}


def _rope_scaling(
    found: Mapping[str, Any], values: Mapping[str, Any], where: str
) -> RopeScaling | None:
    key = "rope_type" if "rope_type" in found else "type"
    kinds = {"default": None, "linear": "linear", "llama3": "llama3"}
    kind = choice(found, key, where, kinds, "default")
    if kind is None:
        return None
    factor = number(found, "factor", where)
    if kind == "linear":
        return RopeScaling(kind, factor)
    low = number(found, "low_freq_factor", where)
    high = number(found, "high_freq_factor", where)
    if low >= high:
        raise CalmError(f"{where}: low_freq_factor {low} is not below high_freq_factor {high}")
    key = "original_max_position_embeddings"
    # In the order of preference of transformers.
    length = values.get(key) or found.get(key) or values.get("max_position_embeddings")
    return RopeScaling(kind, factor, low, high, whole_number({key: length}, key, where))


def _mapping(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = values.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise _wrong(where, key, value, "an object")
    return value or {}


def _get(values: Mapping[str, Any], key: str, where: str, default: Any) -> Any:
    if key not in values and default is None:
        raise CalmError(f"{where}: {key} is missing")
    return values.get(key, default)


def _wrong(where: str, key: str, value: Any, needed: str) -> CalmError:
    return CalmError(f"{where}: {key} is {reprlib.repr(value)}; it must be {needed}")
