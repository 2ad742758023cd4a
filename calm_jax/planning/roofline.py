"""How long a step takes if every part of the chip runs at its peak.

If all four parts overlap, a step takes the longest of their times; if none do, it takes their sum.
A real step is mostly in between. The longest is not a strict lower bound: attention counts at its
full square, although a causal kernel skips about half, and a conditional always counts as the
branch that produces most bytes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from calm_jax.planning.collectives import Collective
from calm_jax.planning.topologies import Topology


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds that each part of a chip needs for one step."""

    compute: float  # matrix products, at the chip's peak
    memory: float  # to and from the chip's memory
    links: float  # between neighbouring chips
    network: float  # between slices

    @property
    def bound(self) -> float:
        """If all four overlap."""
        return max(self.parts.values())

    @property
    def serial(self) -> float:
        """If none overlap."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        return dataclasses.asdict(self)

    @property
    def bottleneck(self) -> str:
        return max(self.parts, key=self.parts.get)


def step_time(
    topology: Topology, flops: float, moved: float, links: float, network: float
) -> StepTime:
    """The step's times on one chip.

    Args:
        flops: of one chip.
        moved: bytes to and from its memory.
        links, network: seconds, from `communication`.
    """
    chip = topology.chip
    return StepTime(flops / chip.flops, moved / chip.hbm_bandwidth, links, network)


def communication(
    collectives: Sequence[Collective], devices: Sequence[Any], topology: Topology
) -> tuple[float, float]:
    """Seconds that links and network are busy with collectives, which do not overlap.

    Args:
        devices: in the mesh's order, each with `coords` and, if there are several slices,
            `slice_index`.
    """
    links = network = 0.0
    for collective in collectives:
        members = [devices[position] for position in collective.group]
        seconds = collective.bytes / _bandwidth(collective, members, topology)
        if _crosses_slices(members):
            network += seconds
        else:
            links += seconds
    return links, network


def _bandwidth(collective: Collective, members: Sequence[Any], topology: Topology) -> float:
    """Bytes per second at which each chip of a group sends."""
    chip = topology.chip
    if _crosses_slices(members):
        return chip.network_bandwidth
    if collective.kind == "collective-permute":
        return chip.link_bandwidth
    extents = [len(set(values)) for values in zip(*(m.coords for m in members), strict=True)]
    # A part of a side is not a ring.
    bandwidth = sum(
        topology.side_bandwidth(side) if extent == topology.shape[side] else chip.link_bandwidth
        for side, extent in enumerate(extents)
        if extent > 1
    )
    # On a ring of n chips, data for another chip travels n / 4 links on average.
    hops = max(1.0, len(members) / 4) if collective.kind == "all-to-all" else 1.0
    return bandwidth / hops


def _crosses_slices(members: Sequence[Any]) -> bool:
    return len({getattr(member, "slice_index", None) for member in members}) > 1
