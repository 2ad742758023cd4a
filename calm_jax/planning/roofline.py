"""How long a step takes if every part of the chip does its best.

The longest of four times is what a step takes in which all parts work at the same time; their sum,
in which nothing runs beside anything else. A real one is mostly between. The longest is no strict
bound: attention is counted at its full square, of which a causal kernel skips about half, and a
conditional always as the branch that makes most bytes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from calm_jax.planning.collectives import Collective
from calm_jax.planning.topologies import Topology


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what they are spent on.

    Attributes:
        compute: products of matrices, at the chip's peak.
        memory: to and from the chip's memory.
        links: between neighbouring chips.
        network: between slices.
    """

    compute: float
    memory: float
    links: float
    network: float

    @property
    def bound(self) -> float:
        """All four at the same time."""
        return max(self.parts.values())

    @property
    def serial(self) -> float:
        """One after the other."""
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
    """The times of one chip's work.

    Args:
        flops: of one chip.
        moved: bytes to and from its memory.
        links, network: seconds, as of `communication`.
    """
    chip = topology.chip
    return StepTime(flops / chip.flops, moved / chip.hbm_bandwidth, links, network)


def communication(
    collectives: Sequence[Collective], devices: Sequence[Any], topology: Topology
) -> tuple[float, float]:
    """Seconds that collectives keep the links and the network busy, one after the other.

    Args:
        devices: in the mesh's order, each with `coords` and, of several slices, `slice_index`.
    """
    links = network = 0.0
    for collective in collectives:
        members = [devices[place] for place in collective.group]
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
    extents = [len(set(places)) for places in zip(*(m.coords for m in members), strict=True)]
    # Along part of a side no ring closes.
    bandwidth = sum(
        topology.side_bandwidth(side) if extent == topology.shape[side] else chip.link_bandwidth
        for side, extent in enumerate(extents)
        if extent > 1
    )
    # On a ring of n what goes to everybody else travels n / 4 links on average.
    hops = max(1.0, len(members) / 4) if collective.kind == "all-to-all" else 1.0
    return bandwidth / hops


def _crosses_slices(members: Sequence[Any]) -> bool:
    return len({getattr(member, "slice_index", None) for member in members}) > 1
