"""What families share whose checkpoints have no config: the form is read off the tensors."""

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm_jax.checkpoints.convert.huggingface_config import LARGEST
from calm_jax.checkpoints.sources.source import Tensor
from calm_jax.errors import CalmError


def shape_of(tensors: Mapping[str, Tensor], name: str, rank: int, where: str) -> tuple[int, ...]:
    """A tensor's shape. Raises `CalmError` when it is missing, or not of `rank` axes."""
    if name not in tensors:
        raise CalmError(f"{where}: tensor {name} is missing")
    shape = tuple(tensors[name].shape)
    if len(shape) != rank:
        raise CalmError(f"{where}: tensor {name} has shape {shape}, not {rank} axes")
    return shape


def number(option: str, value: Any) -> float:
    """A family's option as a finite number. Raises `CalmError` when it is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -LARGEST <= value <= LARGEST:  # a whole number can be above
        raise CalmError(f"{option} is {reprlib.repr(value)}; it must be a finite number")
    return float(value)


def norm_warnings(
    tensors: Mapping[str, Tensor], ending: str, norm_offset: float
) -> tuple[str, ...]:
    """What speaks against `norm_offset`: scales start at 0 where they are centred, else at 1.

    `ending`: of the names of the norms' scales.
    """
    scales = [x[...] for name, x in tensors.items() if name.endswith(ending)]
    if not scales or norm_offset not in (0.0, 1.0):
        return ()
    mean = float(np.mean([np.mean(scale, dtype=np.float32) for scale in scales]))
    if abs(mean - norm_offset) > 0.25:
        return ()
    return (
        f"norm scales average {mean:.2f}, which is what they are where norm_offset is "
        f"{1 - norm_offset}, not {norm_offset}",
    )
