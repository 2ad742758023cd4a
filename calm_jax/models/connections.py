"""The plan of a composition: its connections, and the order in which bridges and layers run.

The anchor first runs its layers up to the first connected one, then *rounds*. A round applies the
bridges of one connected layer, then runs the layers up to the next connected layer. Evenly
spaced rounds with the same augments are merged into one stacked round, which is one scan.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from calm_jax.errors import CalmError
from calm_jax.models.config import CompositionConfig


@dataclasses.dataclass(frozen=True)
class Connection:
    """Connects the output of layer `layer` of augment `augment` to layer `anchor_layer`."""

    augment: int
    layer: int
    anchor_layer: int


@dataclasses.dataclass(frozen=True)
class Round:
    """Bridges, then anchor layers.

    Attributes:
        entries: an entry for each bridge of the round's layer: a tuple of its connection; in a
            stacked round, of its connections, one for each step of the scan.
        stacked: whether the round is a scan.
        first: number of the anchor layer that runs after the (first) bridges.
        layers: number of anchor layers that run; in a stacked round, after each step.
    """

    entries: tuple[tuple[Connection, ...], ...]
    stacked: bool
    first: int
    layers: int


@dataclasses.dataclass(frozen=True)
class ConnectionPlan:
    """All connections in order, the tapped layers of each augment (ascending), and the rounds."""

    connections: tuple[Connection, ...]
    tap_layers: tuple[tuple[int, ...], ...]
    rounds: tuple[Round, ...]

    @property
    def names(self) -> list[str]:
        """`layer→anchor layer` of each connection; of several augments, the number comes first."""
        several = len(self.tap_layers) > 1
        return [
            (f"{c.augment}: " if several else "") + f"{c.layer}→{c.anchor_layer}"
            for c in self.connections
        ]


def plan_connections(
    configs: Sequence[CompositionConfig], anchor_depth: int, augment_depths: Sequence[int]
) -> ConnectionPlan:
    """The plan for one config per augment. Raises `CalmError` if a connection does not fit."""
    if len(configs) != len(augment_depths):
        raise CalmError(
            f"{len(configs)} composition configs were given for {len(augment_depths)} augments"
        )
    scan = all(config.scan for config in configs)
    connections = tuple(
        sorted(
            (
                Connection(augment, i, j)
                for augment, (config, depth) in enumerate(zip(configs, augment_depths, strict=True))
                for i, j in _resolve(config, depth, anchor_depth, augment)
            ),
            key=lambda c: (c.anchor_layer, c.augment, c.layer),
        )
    )
    anchor_layers = sorted({c.anchor_layer for c in connections})
    at_layer = [tuple(c for c in connections if c.anchor_layer == j) for j in anchor_layers]
    same_augments = len({tuple(c.augment for c in here) for here in at_layer}) == 1
    stackable = scan and evenly_spaced(anchor_layers) and same_augments

    following = [after - j for j, after in itertools.pairwise([*anchor_layers, anchor_depth - 1])]
    if stackable:
        rounds = [
            Round(tuple(zip(*at_layer[:-1], strict=True)), True, anchor_layers[0] + 1, following[0])
        ]
    else:
        rounds = [
            Round(tuple((c,) for c in here), False, j + 1, layers)
            for j, here, layers in zip(anchor_layers, at_layer, following, strict=True)
        ][:-1]
    last = tuple((c,) for c in at_layer[-1])
    rounds.append(Round(last, False, anchor_layers[-1] + 1, following[-1]))

    tap_layers = tuple(
        tuple(sorted({c.layer for c in connections if c.augment == augment}))
        for augment in range(len(configs))
    )
    return ConnectionPlan(connections, tap_layers, tuple(rounds))


def _resolve(
    config: CompositionConfig, depth: int, anchor_depth: int, augment: int
) -> tuple[tuple[int, int], ...]:
    try:
        return config.resolve(depth, anchor_depth)
    except CalmError as error:
        raise CalmError(f"augment {augment}: {error}") from None


def evenly_spaced(layers: Sequence[int]) -> bool:
    """Whether there are more than two layers with equal gaps between them."""
    gaps = {after - before for before, after in itertools.pairwise(layers)}
    return len(layers) > 2 and len(gaps) == 1
