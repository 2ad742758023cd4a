"""Rows that belong together, such as a task's languages: their mean, and wins over the anchor."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from calm_jax.evaluation import metric_table

Cell = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Group:
    """The rows of a group."""

    name: str
    metric: str
    rows: int
    mean: float  # of the rows' main metric, each of which counts alike
    # of the mean, from those of the rows as if their examples had nothing in common
    interval: tuple[float, float]
    # rows in which the model scores better than the anchor alone; None: it was not scored
    wins: int | None = None

    def __str__(self) -> str:
        low, high = self.interval
        words = f"mean {self.metric} {self.mean:.1f} of {self.rows} rows"
        words += f" (95% interval {low:.1f}–{high:.1f})"
        if self.wins is not None:
            words += f"; better than the anchor in {self.wins} of {self.rows}"
        return words


def groups(scores: Mapping[str, Cell], anchor: Mapping[str, Cell] | None = None) -> list[Group]:
    """The groups of a model's scores by task; `anchor` holds the scores of its anchor alone."""
    found: dict[str, list[str]] = {}
    for task, cell in scores.items():
        if "group" in cell:
            found.setdefault(cell["group"], []).append(task)
    return [_group(name, tasks, scores, anchor) for name, tasks in found.items()]


def _group(
    name: str, tasks: list[str], scores: Mapping[str, Cell], anchor: Mapping[str, Cell] | None
) -> Group:
    cells = [scores[task] for task in tasks]
    values = [metric_table.main_value(cell) for cell in cells]
    mean = sum(values) / len(values)
    # For independent rows, the squares of half-widths add up.
    half = math.hypot(*((cell["interval"][1] - cell["interval"][0]) / 2 for cell in cells))
    half /= len(cells)
    wins = None
    if anchor is not None and all(task in anchor for task in tasks):
        wins = sum(
            value > metric_table.main_value(anchor[task])
            for task, value in zip(tasks, values, strict=True)
        )
    metric = metric_table.main_name(cells[0])
    return Group(name, metric, len(tasks), mean, (mean - half, mean + half), wins)
