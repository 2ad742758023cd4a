"""The figures of an experiment's page: bars of scores, and curves over what arms differ in."""

from collections.abc import Sequence

from calm_jax.evaluation import metric_table
from calm_jax.evaluation.charts import LineChart, Series, line_chart
from calm_jax.evaluation.page import cut, shade
from calm_jax.evaluation.score_sections import Bar, Figure, Group
from calm_jax.experiment.arms import Experiment
from calm_jax.experiment.comparison import Row

_COLOURS = {
    "part": "var(--anchor)",
    "calm": "var(--composed)",
    "baseline": "var(--other-0)",
    "ablation": "var(--augment)",
    "control": "var(--constant)",
}
_LABEL = 12  # characters of a line's name


def bars(task: str, rows: Sequence[Row]) -> Figure | None:
    """Bars of a share in percent; None of other metrics."""
    cells = [(row, row.cells[task]) for row in rows if task in row.cells]
    if any(metric_table.find(cell.metric).unit != "%" for _, cell in cells):
        return None
    found = [
        Bar(row.arm.title, cell.mean, _COLOURS[row.arm.kind], cell.interval) for row, cell in cells
    ]
    return Figure(task, [Group(found)])


def curves(
    experiment: Experiment, rows: Sequence[Row], tasks: Sequence[str]
) -> list[tuple[str, LineChart]]:
    """The scores of the arms that have an x over it, by metric: a line a task, in its interval."""
    points = sorted((row for row in rows if row.arm.x is not None), key=lambda row: row.arm.x)
    by_metric: dict[str, list[str]] = {}
    for task in tasks:
        metrics = {row.cells[task].metric for row in points if task in row.cells}
        for metric in metrics:
            by_metric.setdefault(metric, []).append(task)
    charts = []
    for metric, of_metric in by_metric.items():
        lines = []
        for number, task in enumerate(of_metric):
            cells = [(row.arm.x, row.cells[task]) for row in points if task in row.cells]
            xs = [x for x, _ in cells]
            means, intervals = (
                [getattr(cell, name) for _, cell in cells] for name in ("mean", "interval")
            )
            label = cut(task.rpartition("/")[2], _LABEL)
            colour = shade(number, len(of_metric))
            lines.append(Series(xs, means, colour, "dots", label, intervals))
        description = f"{metric} over {experiment.axis}"
        is_share = metric_table.find(metric).unit == "%"
        chart = line_chart(description, lines, percent=is_share, axis=experiment.axis)
        charts.append((metric, chart))
    return charts
