"""The page's sections on training and the bridge. Missing data makes one line, never an error."""

from collections.abc import Sequence

from calm_jax.evaluation import charts
from calm_jax.evaluation.charts import Series
from calm_jax.evaluation.page import (
    Element,
    cut,
    element,
    figure,
    missing,
    panels,
    run_colour,
    section,
    visible,
)
from calm_jax.evaluation.results import Run

_HEATMAPS = 9  # of one run at most


def curves(runs: Sequence[Run]) -> Element:
    """Loss, then accuracy, of each run over its steps."""
    losses, accuracies = [], []
    for run in runs:
        shade = run_colour(run)
        loss = [
            Series(*run.curve("train", "loss"), shade, "faint"),
            Series(*run.curve("validation", "loss"), shade, "dots"),
        ]
        accuracy = [
            Series(*_in_percent(*run.curve("train", "accuracy")), shade, "faint"),
            Series(*_in_percent(*run.curve("validation", "accuracy")), shade, "dashed"),
            *_whole_answers(run),
        ]
        if any(line.xs for line in loss):
            chart = charts.line_chart(f"Loss of {run.name} over training steps", loss, log=True)
            losses.append(figure(f"{visible(run.name)}: loss", chart))
        if any(line.xs for line in accuracy):
            about = f"Accuracy of {run.name} over training steps, in percent"
            chart = charts.line_chart(about, accuracy, percent=True)
            accuracies.append(figure(f"{visible(run.name)}: accuracy", chart))
    if not losses and not accuracies:
        return section("Training", missing("No run has logged a training step yet."))
    marks = charts.legend(
        ("faint", None, "training batches"),
        ("dots", None, "validation: loss; accuracy of whole answers"),
        ("dashed", None, "validation: accuracy of tokens"),
    )
    between = element("div", class_="rule") if losses and accuracies else None
    return section(
        "Training", marks, panels(losses) if losses else None, between,
        panels(accuracies) if accuracies else None,
    )  # fmt: skip


def usage(runs: Sequence[Run]) -> Element:
    """How large each connection's part is beside the anchor's hidden state, over training."""
    heading = "How much each connection is used"
    figures = []
    for run in runs:
        keys = _metrics(run, "connection/")
        names = run.costs.get("connections", ())
        lines = []
        for index, key in enumerate(keys):
            steps, values = run.curve("train", key)
            if not steps:
                steps, values = run.curve("validation", key)
            label = names[index] if len(names) == len(keys) else key.removeprefix("connection/")
            lines.append(Series(steps, values, _shade(index, len(keys)), "line", label))
        if any(line.xs for line in lines):
            about = (
                f"Relative size of each connection's contribution in {run.name} over training steps"
            )
            figures.append(figure(visible(run.name), charts.line_chart(about, lines)))
    if not figures:
        return section(heading, missing("No composed run has logged its connections yet."))
    text = (
        "The size of what f_cross adds, relative to the anchor's hidden state that it is added to, "
        "‖f_cross‖ / ‖H‖. A line is named by its connection: augment layer → anchor layer, counted "
        "from 0; of several augments, the augment's number stands before it."
    )
    words = element("p", text, class_="note")
    return section(heading, element("div", *figures, words, class_="beside"))


def attention(runs: Sequence[Run]) -> Element:
    """One heatmap a connection for one expression."""
    heading = "What f_cross looks at"
    parts: list[Element] = []
    for run in runs:
        if not run.attention:
            continue
        tokens = [visible(token) for token in run.attention["tokens"]]
        several = len({c["augment"] for c in run.attention["connections"]}) > 1
        shown = run.attention["connections"][:_HEATMAPS]
        figures = []
        for connection in shown:
            name = f"augment layer {connection['from']} → anchor layer {connection['to']}"
            name = f"augment {connection['augment']}: {name}" if several else name.capitalize()
            about = f"Attention from anchor positions (rows) to augment positions (columns), {name}"
            figures.append(figure(name, charts.heatmap(about, tokens, connection["weights"])))
        parts += [
            element(
                "p",
                f"{visible(run.name)} reads ",
                element("code", cut(visible(run.attention["inputs"]), 160)),
                ". Each row is a position of the anchor, each column a position of the augment it "
                "may look at: itself and those before it. Weights are means over heads.",
                class_="note",
            ),
            element("p", "Weight ", charts.heat_key(), class_="legend"),
            panels(figures, wide=len(tokens) > 16 or len(figures) in (2, 4)),
        ]
        if len(shown) < len(run.attention["connections"]):
            total = len(run.attention["connections"])
            parts.append(missing(f"Shown are the first {len(shown)} of {total} connections."))
    if not parts:
        return section(heading, missing("No attention map has been written yet."))
    return section(heading, *parts)


def _whole_answers(run: Run) -> list[Series]:
    """Exactness in validation: a line a set, named, where there are several sets."""
    keys = _metrics(run, "exact/")
    if len(keys) < 2:
        steps, values = run.curve("validation", "exact")
        return [Series(*_in_percent(steps, values), run_colour(run), "dots")]
    lines = []
    for index, key in enumerate(keys):
        label = cut(visible(key.removeprefix("exact/").rpartition("_")[2]), 12)
        points = _in_percent(*run.curve("validation", key))
        lines.append(Series(*points, _shade(index, len(keys)), "dots", label))
    return lines


def _metrics(run: Run, prefix: str) -> list[str]:
    """The names of logged metrics that start so, in order, numbers by their size."""
    names = {key for line in run.metrics for key in line if key.startswith(prefix)}
    return sorted(names, key=lambda name: (len(name), name) if name[-1].isdigit() else (0, name))


def _in_percent(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    return steps, [100 * value for value in values]


def _shade(index: int, count: int) -> str:
    """From green over blue to amber, so that neighbours of a few lines stay apart."""
    stops = ((11, 116, 100), (43, 95, 158), (180, 83, 9))
    place = 0.0 if count < 2 else index / (count - 1) * (len(stops) - 1)
    below = min(int(place), len(stops) - 2)
    mix = zip(stops[below], stops[below + 1], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - below)):02x}" for a, b in mix)
