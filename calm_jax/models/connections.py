"""Which bridge meets which layers: the plan of a composition, made of numbers alone.

The anchor runs as: first layers, then *rounds*. A round applies the bridges of one connected layer
and runs the layers that follow it, up to the next connected layer. Evenly spaced rounds of the same
form are one stacked round, run by one scan.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from calm_jax.errors import CalmError
from calm_jax.models.config import CompositionConfig
from calm_jax.models.stack import Shape, cut_at


@dataclasses.dataclass(frozen=True)
class Connection:
    """One connected pair: the output of `layer` of augment number `augment` to `anchor_layer`."""

    augment: int
    layer: int
    anchor_layer: int


@dataclasses.dataclass(frozen=True)
class Round:
    """Bridges, then anchor layers.

    `entries` holds, for each bridge at a connected layer, its connection; in a stacked round, its
    connections, one a step of the scan. `piece` is the anchor's piece that follows, or None.
    """

    entries: tuple[tuple[Connection, ...], ...]
    stacked: bool
    piece: int | None


@dataclasses.dataclass(frozen=True)
class ConnectionPlan:
    """The whole plan: `connections` in the order of their numbers, cuts, and rounds."""

    connections: tuple[Connection, ...]
    anchor_shapes: tuple[Shape, ...]
    augment_shapes: tuple[tuple[Shape, ...], ...]
    tap_layers: tuple[tuple[int, ...], ...]  # of each augment, ascending
    rounds: tuple[Round, ...]

    @property
    def names(self) -> list[str]:
        """`layer→anchor layer` of each connection; of several augments with its number before."""
        several = len(self.tap_layers) > 1
        return [
            (f"{c.augment}: " if several else "") + f"{c.layer}→{c.anchor_layer}"
            for c in self.connections
        ]


def plan_connections(
    configs: Sequence[CompositionConfig], anchor_depth: int, augment_depths: Sequence[int]
) -> ConnectionPlan:
    """The plan for one config an augment. Raises `CalmError` for connections that do not fit."""
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
    stackable = scan and _evenly_spaced(anchor_layers) and _same_form(at_layer)

    if stackable:
        anchor_shapes = cut_at(anchor_depth, anchor_layers, slice(1, len(anchor_layers)))
        rounds = [
            Round(tuple(zip(*at_layer[:-1], strict=True)), True, 1),
            Round(tuple((c,) for c in at_layer[-1]), False, 2),
        ]
    else:
        anchor_shapes = cut_at(anchor_depth, anchor_layers, None)
        rounds = [Round(tuple((c,) for c in here), False, k + 1) for k, here in enumerate(at_layer)]
    if rounds[-1].piece == len(anchor_shapes):  # nothing follows the last connected layer
        rounds[-1] = dataclasses.replace(rounds[-1], piece=None)

    tap_layers = tuple(
        tuple(sorted({c.layer for c in connections if c.augment == augment}))
        for augment in range(len(configs))
    )
    augment_shapes = tuple(
        cut_at(
            depth,
            taps,
            slice(0, len(taps) - 1) if scan and _evenly_spaced([-1, *taps[:-1]]) else None,
        )
        for depth, taps in zip(augment_depths, tap_layers, strict=True)
    )
    return ConnectionPlan(connections, anchor_shapes, augment_shapes, tap_layers, tuple(rounds))


def _resolve(
    config: CompositionConfig, depth: int, anchor_depth: int, augment: int
) -> tuple[tuple[int, int], ...]:
    try:
        return config.resolve(depth, anchor_depth)
    except CalmError as error:
        raise CalmError(f"augment {augment}: {error}") from None


def _evenly_spaced(layers: Sequence[int]) -> bool:
    gaps = {after - before for before, after in itertools.pairwise(layers)}
    return len(layers) > 2 and len(gaps) == 1


def _same_form(at_layer: Sequence[Sequence[Connection]]) -> bool:
    return len({tuple(c.augment for c in here) for here in at_layer}) == 1
