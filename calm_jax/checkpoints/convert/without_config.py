"""Shared by families whose checkpoints have no config: their tensors show what the model is."""

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm_jax.checkpoints.convert.huggingface_config import LARGEST
from calm_jax.checkpoints.sources.source import Tensor
from calm_jax.errors import CalmError


def shape_of(tensors: Mapping[str, Tensor], name: str, rank: int, where: str) -> tuple[int, ...]:
    """A tensor's shape. Raises `CalmError` if it is missing or does not have `rank` axes."""
    if name not in tensors:
        raise CalmError(f"{where}: tensor {name} is missing")
    shape = tuple(tensors[name].shape)
    if len(shape) != rank:
        raise CalmError(f"{where}: tensor {name} has shape {shape}, not {rank} axes")
    return shape


def number(option: str, value: Any) -> float:
    """The value of a family's option as a finite number. Raises `CalmError` if it is not one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -LARGEST <= value <= LARGEST:  # a whole number can exceed any float
        raise CalmError(f"{option} is {reprlib.repr(value)}; it must be a finite number")
    return float(value)


def shown_norm_offset(
    tensors: Mapping[str, Tensor], ending: str, given: Any, usual: float, where: str
) -> tuple[float, tuple[str, ...]]:
    """The offset that a model adds to its stored norm scales, and warnings about it.

    Training starts from effective scales of 1, so stored scales stay around 1 - offset.

    Args:
        ending: how the names of the norm scales end; these tensors are read.
        given: the option's value, which decides; None: the stored scales decide.
        usual: the family's own offset.

    Raises:
        CalmError: `given` is not a number, or the scales' average is neither near 0 nor near 1.
    """
    scales = [x[...] for name, x in tensors.items() if name.endswith(ending)]
    mean = float(np.mean([np.mean(x, dtype=np.float32) for x in scales])) if scales else 1 - usual
    shown = 1.0 if mean <= 0.25 else 0.0 if 0.75 <= mean <= 1.25 else None
    if given is not None:
        given = number("norm_offset", given)
        if shown is None or given == shown or given not in (0.0, 1.0):
            return given, ()
        return given, (f"norm scales average {mean:.2f}, as with norm_offset={shown}, not {given}",)
    if shown is None:
        raise CalmError(
            f"{where}: norm scales average {mean:.2f}, which does not show whether 1 is added to "
            "them; give the option norm_offset=0.0 or norm_offset=1.0"
        )
    if shown == usual:
        return shown, ()
    return shown, (f"norm scales average {mean:.2f}: they are read with norm_offset={shown}",)
