"""The content of the page's sections on training and the bridge; the templates lay it out."""

from collections.abc import Sequence
from typing import Any

from calm_jax.evaluation.charts import LineChart, Series, line_chart
from calm_jax.evaluation.page import cut, run_colour, shade
from calm_jax.evaluation.results import Run

HEATMAPS = 9  # of one run at most
_LABEL = 12  # characters of a token or of a set's name


def losses(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each run's loss over its steps, with the anchor's where it is known.

    `anchor` is the anchor's validation loss, `best` the pair's least one and `step` its step.
    """
    figures = []
    for run in runs:
        colour = run_colour(run)
        train, validation = run.curve("train", "loss"), run.curve("validation", "loss")
        lines = [Series(*train, colour, "faint"), Series(*validation, colour, "dots")]
        anchor = run.curve("anchor", "loss")[1]
        steps = train[0] + validation[0]
        if anchor and steps:
            ends = (min(steps), max(steps))
            lines.append(Series(ends, anchor * 2, "var(--anchor)", "dashed", "anchor"))
        chart = line_chart(f"Loss of {run.name} over training steps", lines, log=True)
        found = {"run": run, "chart": chart, "anchor": anchor[0] if anchor else None}
        if anchor and validation[0]:
            found["best"], found["step"] = min(zip(*reversed(validation), strict=True))
        figures.append(found)
    return [figure for figure in figures if figure["chart"]]


def accuracies(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each run's accuracy over its steps, in percent."""
    figures = []
    for run in runs:
        colour = run_colour(run)
        lines = [
            Series(*_in_percent(run.curve("train", "accuracy")), colour, "faint"),
            Series(*_in_percent(run.curve("validation", "accuracy")), colour, "dashed"),
            *_whole_answers(run),
        ]
        about = f"Accuracy of {run.name} over training steps, in percent"
        figures.append({"run": run, "chart": line_chart(about, lines, percent=True)})
    return [figure for figure in figures if figure["chart"]]


def usage(runs: Sequence[Run]) -> list[tuple[Run, LineChart]]:
    """The size of each connection's result relative to the anchor's hidden state, over training."""
    charts = []
    for run in runs:
        keys = _metrics(run, "connection/")
        names = run.costs.get("connections", ())
        lines = []
        for index, key in enumerate(keys):
            label = names[index] if len(names) == len(keys) else key.removeprefix("connection/")
            lines.append(Series(*_size(run, key), shade(index, len(keys)), "line", label))
        about = f"Relative size of each connection's contribution in {run.name} over training steps"
        charts.append((run, line_chart(about, lines)))
    return [(run, chart) for run, chart in charts if chart]


def attention(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The heatmaps of each composed run: for one prompt, one for each connection.

    `adds` is the size of what the connection adds, relative to the anchor's hidden state, when it
    was last logged; None if it was not.
    """
    found = []
    for run in runs:
        if not run.attention:
            continue
        kept = run.attention["connections"]
        several = len({connection["augment"] for connection in kept}) > 1
        keys = _metrics(run, "connection/")
        sizes = [_size(run, key)[1] for key in keys] if len(keys) == len(kept) else []
        maps = []
        for number, connection in enumerate(kept[:HEATMAPS]):
            name = f"augment layer {connection['from']} → anchor layer {connection['to']}"
            name = f"augment {connection['augment']}: {name}" if several else name.capitalize()
            adds = sizes[number][-1] if sizes and sizes[number] else None
            maps.append({"name": name, "weights": connection["weights"], "adds": adds})
        tokens = run.attention["tokens"]
        labels = [cut(token.strip() or token.replace(" ", "␣"), _LABEL) for token in tokens]
        found.append({"run": run, "inputs": run.attention["inputs"], "tokens": tokens,
                      "labels": labels, "maps": maps, "total": len(kept)})  # fmt: skip
    return found


def _size(run: Run, key: str) -> tuple[list[float], list[float]]:
    """The curve of a connection's size: in training, or else in validation."""
    steps, values = run.curve("train", key)
    return (steps, values) if steps else run.curve("validation", key)


def _whole_answers(run: Run) -> list[Series]:
    """Exactness in validation: a line for each set, named, where there are several sets."""
    keys = _metrics(run, "exact/")
    if len(keys) < 2:
        return [Series(*_in_percent(run.curve("validation", "exact")), run_colour(run), "dots")]
    lines = []
    for index, key in enumerate(keys):
        label = cut(key.removeprefix("exact/").rpartition("_")[2], _LABEL)
        points = _in_percent(run.curve("validation", key))
        lines.append(Series(*points, shade(index, len(keys)), "dots", label))
    return lines


def _metrics(run: Run, prefix: str) -> list[str]:
    """The names of logged metrics that start so, in order, numbers by their size."""
    names = {key for line in run.metrics for key in line if key.startswith(prefix)}
    return sorted(names, key=lambda name: (len(name), name) if name[-1].isdigit() else (0, name))


def _in_percent(curve: tuple[list[float], list[float]]) -> tuple[list[float], list[float]]:
    return curve[0], [100 * value for value in curve[1]]
