"""The figures of an experiment's page: bars of scores, curves, and gains by language."""

import dataclasses
from collections.abc import Sequence

from calm_jax.evaluation import metric_table
from calm_jax.evaluation.charts import LineChart, Series, Tick, compact, even_ticks, line_chart
from calm_jax.evaluation.page import cut, shade
from calm_jax.evaluation.score_sections import Bar, Figure, Group
from calm_jax.experiment.arms import KINDS, Experiment
from calm_jax.experiment.comparison import Cell, Row

_COLOURS = {
    "part": "var(--anchor)",
    "calm": "var(--composed)",
    "baseline": "var(--other-0)",
    "ablation": "var(--augment)",
    "control": "var(--constant)",
}
_LABEL = 12  # characters of a line's name


def bars(task: str, rows: Sequence[Row]) -> Figure | None:
    """Bars of a share in percent; None of other metrics, and of a group's rows: too many."""
    cells = [(row, row.cells[task]) for row in rows if task in row.cells]
    if any(cell.group or metric_table.find(cell.metric).unit != "%" for _, cell in cells):
        return None
    found = []
    for kind, label in KINDS.items():
        of_kind = [
            Bar(row.arm.title, cell.mean, _COLOURS[kind], cell.interval)
            for row, cell in cells
            if row.arm.kind == kind
        ]
        found += [Group(of_kind, label)] if of_kind else []
    return Figure(task, found)


def curves(
    experiment: Experiment, rows: Sequence[Row], tasks: Sequence[str]
) -> list[tuple[str, LineChart]]:
    """The scores of the arms that have an x over it, by metric: a line a task, in its interval.

    Rows of a group are left out: too many.
    """
    points = sorted((row for row in rows if row.arm.x is not None), key=lambda row: row.arm.x)
    by_metric: dict[str, list[str]] = {}
    for task in tasks:
        cell = next((row.cells[task] for row in points if task in row.cells), None)
        if cell and not cell.group:
            by_metric.setdefault(cell.metric, []).append(task)
    charts = []
    for metric, of_metric in by_metric.items():
        lines = []
        for number, task in enumerate(of_metric):
            scored = [row for row in points if task in row.cells]
            xs, cells = [row.arm.x for row in scored], [row.cells[task] for row in scored]
            means, intervals = [cell.mean for cell in cells], [cell.interval for cell in cells]
            label = cut(task.rpartition("/")[2], _LABEL)
            colour = shade(number, len(of_metric))
            lines.append(Series(xs, means, colour, "dots", label, intervals))
        description = f"{metric} over {experiment.axis}"
        is_share = metric_table.find(metric).unit == "%"
        chart = line_chart(description, lines, percent=is_share, axis=experiment.axis)
        charts.append((metric, chart))
    return charts


@dataclasses.dataclass(frozen=True)
class Gain:
    """What the reference gains over its anchor on a row of a group, in SVG units."""

    task: str
    value: float
    x: float
    top: float  # of its bar
    height: float
    low: float  # end of its 95 % interval
    high: float


@dataclasses.dataclass(frozen=True)
class Gains:
    """Bars of the gain on each row of a group, the paper's Figure 2."""

    group: str
    metric: str
    bars: list[Gain]
    wins: int
    ticks: list[Tick]
    zero: float
    bar: float
    width: float = 680
    height: float = 210


def gains(experiment: Experiment, rows: Sequence[Row]) -> list[Gains]:
    """The reference's gains over its anchor by group of tasks, in the order in which they stand.

    Tasks of several languages go from few to many resources.
    """
    by_name = {row.arm.name: row for row in rows}
    reference = by_name.get(experiment.reference)
    anchor = by_name.get(reference.arm.anchor) if reference else None
    if anchor is None:
        return []
    found: dict[str, list[tuple[str, Cell]]] = {}
    for task in reference.cells:
        cell = anchor.cells.get(task)
        if cell and cell.group and cell.difference is not None:
            found.setdefault(cell.group, []).append((task, cell))
    return [_gains(group, cells) for group, cells in found.items() if len(cells) > 1]


def _gains(group: str, cells: Sequence[tuple[str, Cell]]) -> Gains:
    # An anchor's difference is from the reference: the gain is its opposite.
    values = [
        (task, -cell.difference, -cell.difference_interval[1], -cell.difference_interval[0])
        for task, cell in cells
    ]
    ends = [end for _, value, *interval in values for end in (value, *interval)]
    ticks = even_ticks(min(0, *ends), max(0, *ends))
    left, top, bottom = 44, 10, 160
    room = (Gains.width - left) / len(values)

    def y(value: float) -> float:
        return top + (ticks[-1] - value) / (ticks[-1] - ticks[0]) * (bottom - top)

    bars = [
        Gain(
            task.removeprefix(f"{group}/"),
            value,
            left + (number + 0.5) * room,
            min(y(value), y(0)),
            abs(y(value) - y(0)),
            y(low),
            y(high),
        )
        for number, (task, value, low, high) in enumerate(values)
    ]
    return Gains(
        group,
        cells[0][1].metric,
        bars,
        sum(value > 0 for _, value, *_ in values),
        [Tick(y(tick), compact(tick)) for tick in ticks],
        y(0),
        0.7 * room,
    )
