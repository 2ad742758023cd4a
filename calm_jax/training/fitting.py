"""Checks that a compiled step fits into a device's memory before it first runs."""

import re
from typing import Any

import jax

from calm_jax import units
from calm_jax.chips import chip_of
from calm_jax.errors import CalmError
from calm_jax.training.abstract_run import AbstractRun
from calm_jax.training.costs import tree_shards

ADVICE = (
    "raise train.accumulate, set train.remat=full, or give mesh.fsdp and mesh.tensor more devices; "
    "`calm plan --search` finds the fastest that fits"
)
_NEEDED = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available")


class TooLarge(CalmError):
    """A step does not fit; `needed` is in bytes, or None if the compiler does not say."""

    def __init__(self, needed: int | None, device: jax.Device):
        self.needed = needed
        available = memory_of(device)
        much = units.size(needed) if needed else "more memory"
        there = units.size(available) if available else "less"
        super().__init__(
            f"a step needs {much} on each device, but {device.device_kind} has {there}; {ADVICE}"
        )


def memory_of(device: jax.Device) -> int | None:
    """Bytes that a program can use on a device, or None if unknown."""
    if device.platform == "cpu":
        return None
    chip = chip_of(device.device_kind)
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # another process' device, or one only to compile for
        limit = None
    return limit or (chip.hbm_bytes if chip else None)


def check_held(run: AbstractRun, device: jax.Device) -> None:
    """Raises `TooLarge` if a run's trees alone do not fit on devices like `device`."""
    rows = tree_shards(run.parts, run.shardings, *run.trees())
    held, available = sum(row["bytes"] for row in rows), memory_of(device)
    if available is not None and held > available:
        raise TooLarge(held, device)


def compile_to_fit(lowered: jax.stages.Lowered, device: jax.Device) -> jax.stages.Compiled:
    """Compiles a step for devices like `device`.

    Raises `TooLarge` as `compile_lowered`, or if the compiled step needs too much memory.
    """
    compiled = compile_lowered(lowered, device)
    needed = getattr(compiled.memory_analysis(), "peak_memory_in_bytes", 0)
    available = memory_of(device)
    if available is not None and needed > available:
        raise TooLarge(needed, device)
    return compiled


def compile_lowered(
    lowered: jax.stages.Lowered, device: jax.Device, options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """Compiles. Raises `TooLarge` if the compiler cannot make the step fit."""
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = _NEEDED.search(str(error))
        needed = int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else None
        raise TooLarge(needed, device) from None
