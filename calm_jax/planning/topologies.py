"""Slices of TPUs and nodes of GPUs that cloud providers offer, by name.

The compiler accepts shapes that nobody offers; those listed here are the documented ones.
"""

import dataclasses
import difflib
import math
import types

from calm_jax.chips import CHIPS, Chip
from calm_jax.errors import CalmError

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SHAPES = {
    "v5e": _FLAT,
    "v5p": (
        "2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
        "16x16x16", "16x16x24",
    ),
    "v6e": _FLAT,
    "h100": ("1", "2", "4", "8"),
    "h200": ("1", "2", "4", "8"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices (or nodes) of one shape, joined by the data-centre network."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def name(self) -> str:
        several = f"*{self.slices}" if self.slices > 1 else ""
        return f"{self.chip.name}:{self.shape_name}{several}"

    @property
    def shape_name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def chips(self) -> int:
        return self.slices * self.chips_per_slice

    @property
    def compiled(self) -> bool:
        """Whether there is a compiler for it that needs no device; else plans are by formula."""
        return self.chip.torus > 0

    @property
    def device(self) -> types.SimpleNamespace:
        """A stand-in for one of its `jax.Device`s, with the attributes that planning reads."""
        memories = [types.SimpleNamespace(kind=kind) for kind in ("device", "pinned_host")]
        return types.SimpleNamespace(
            platform="tpu" if self.compiled else "gpu",
            device_kind=self.chip.kinds[0],
            compute_capability=None if self.compiled else "9.0",  # of both GPUs
            addressable_memories=lambda: memories,
        )

    def side_bandwidth(self, side: int) -> float:
        """Bytes per second that a chip sends along one side of its slice.

        On a ring, both of its links share the load. If the ends are not connected, the last chip
        has one link, and all others wait for it.
        """
        chip = self.chip
        if not chip.torus:
            return chip.link_bandwidth
        ring = self.shape[side] >= chip.torus and self.shape[side] > 2
        return chip.link_bandwidth * (2 if ring else 1)


def names() -> list[str]:
    """Every topology of one slice."""
    return [f"{chip}:{shape}" for chip, shapes in SHAPES.items() for shape in shapes]


def find(name: str) -> Topology:
    """The topology "CHIP:SHAPE" or "CHIP:SHAPE*SLICES", such as "v5e:16x16*4".

    Raises:
        CalmError: no such slice is offered; the message names the nearest ones.

    >>> find("v5e:16x16*4").chips
    1024
    """
    base, star, count = name.partition("*")
    chip, _, shape = base.partition(":")
    if shape not in SHAPES.get(chip, ()):
        near = [f"{chip}:{known}" for known in SHAPES.get(chip, ())]
        near = near or difflib.get_close_matches(base, names(), n=4, cutoff=0.3) or names()
        raise CalmError(f"--topology={name}: there is no such slice; there are {', '.join(near)}")
    if star and not (count.isdecimal() and int(count) > 0):
        raise CalmError(f"--topology={name}: {count!r} is not a number of slices")
    sides = tuple(int(side) for side in shape.split("x"))
    return Topology(CHIPS[chip], sides, int(count) if star else 1)
