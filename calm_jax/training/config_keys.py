"""Keys and plain values of a config. Imports nothing slow, so that flags are parsed quickly."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from calm_jax.errors import CalmError


def unknown_key(key: str, known: Iterable[str]) -> CalmError:
    """The error for an unknown key, which suggests the most similar known one."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)
    return CalmError(f"unknown config key {key!r}; did you mean {nearest[0]!r}?")


def to_dict(config: Any) -> Any:
    """Plain values as in JSON: sections become dicts, tuples become lists."""
    if isinstance(config, Mapping | ConfigDict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    return config


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    result = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping | ConfigDict) and value
        result |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return result
