"""Slices of TPUs and nodes of GPUs that can be had, by name, and what a chip of each can do.

The compiler takes topologies that nobody offers, so the shapes here are those of the documents.
"""

import dataclasses
import difflib
import math
import types

from calm_jax.errors import CalmError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as it is documented. All bandwidths are in bytes per second.

    Attributes:
        hbm_bytes: memory that a program can have, a little less than the chip has.
        flops: peak, bfloat16, dense, per second.
        hbm_bandwidth: to and from the chip's memory.
        link_bandwidth: of one link to a neighbour, in one direction.
        network_bandwidth: of the data-centre network, the chip's share of its host's.
        torus: number of chips along a side from which its two ends are joined; 0: the chips are
            joined by a switch.
    """

    name: str
    kinds: tuple[str, ...]  # jax's names for such devices
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    torus: int


# https://cloud.google.com/tpu/docs/{v5e,v5p,v6e}: peak, memory, "bidirectional ICI bandwidth per
# chip" (halved, over four ports or six), data-centre network of a pod over its chips. The memory
# that programs can have is what the compiler reports. Ends are joined on a side of a whole pod's
# length (v5e, v6e) or of whole cubes of four (v5p).
# H100 and H200: the data sheets of the SXM modules, NVLink as one link, one 400 Gb/s card a GPU;
# memory that XLA may take of them: 90 % (its option for preallocation is more careful still).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), int(15.75 * GIB), 197e12, 819e9, 50e9, 3.125e9, 16),
        Chip("v5p", ("TPU v5", "TPU v5p"), int(95.73 * GIB), 459e12, 2765e9, 100e9, 6.25e9, 4),
        Chip(
            "v6e", ("TPU v6 lite", "TPU v6e"), int(31.24 * GIB), 918e12, 1638e9, 100e9, 12.5e9, 16
        ),
        Chip("h100", ("NVIDIA H100 80GB HBM3",), int(0.9 * 80e9), 989e12, 3350e9, 450e9, 50e9, 0),
        Chip("h200", ("NVIDIA H200",), int(0.9 * 141e9), 989e12, 4800e9, 450e9, 50e9, 0),
    )
}

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
        """Whether the compiler for it runs without it; otherwise only formulas speak."""
        return self.chip.torus > 0

    @property
    def device(self) -> types.SimpleNamespace:
        """What a `jax.Device` of it says of itself, as far as anybody asks before it computes."""
        memories = [types.SimpleNamespace(kind=kind) for kind in ("device", "pinned_host")]
        return types.SimpleNamespace(
            platform="tpu" if self.compiled else "gpu",
            device_kind=self.chip.kinds[0],
            compute_capability=None if self.compiled else "9.0",  # of both GPUs
            addressable_memories=lambda: memories,
        )

    def side_bandwidth(self, side: int) -> float:
        """Bytes per second that leave a chip along one side of its slice, in all directions.

        On a ring both links carry their share; where the ends are not joined, the last chip has
        one link, and all the others wait for it.
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
        CalmError: no such slice is offered; the nearest that are, are named.

    >>> find("v5e:16x16*4").chips
    1024
    """
    base, star, count = name.partition("*")
    chip, _, shape = base.partition(":")
    if shape not in SHAPES.get(chip, ()):
        near = [f"{chip}:{known}" for known in SHAPES.get(chip, ())]
        near = near or difflib.get_close_matches(base, names(), n=4, cutoff=0.3) or names()
        raise CalmError(f"--topology={name}: no such slice; there are {', '.join(near)}")
    if star and not (count.isdecimal() and int(count) > 0):
        raise CalmError(f"--topology={name}: {count!r} is not a number of slices")
    sides = tuple(int(side) for side in shape.split("x"))
    return Topology(CHIPS[chip], sides, int(count) if star else 1)


def chip_of(kind: str) -> Chip | None:
    """The chip whose devices jax calls `kind`, or None."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
