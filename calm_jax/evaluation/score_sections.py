"""The content of the page's sections on right and wrong answers; the templates lay it out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from calm_jax.evaluation import groups, metric_table, metrics
from calm_jax.evaluation.page import run_colour
from calm_jax.evaluation.results import Run
from calm_jax.evaluation.table1 import MODELS, PAPER, SETS, Table1, expressions

_EXAMPLES = 5  # right ones, and as many wrong ones


@dataclasses.dataclass(frozen=True)
class Bar:
    """A share in percent, with its interval and the paper's figure where there are such."""

    label: str
    value: float
    colour: str
    interval: Sequence[float] | None = None
    paper: float | None = None
    faint: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
    """Bars below one another, under an optional title."""

    bars: list[Bar]
    title: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """Groups of bars from 0 to 100 %."""

    title: str
    groups: list[Group]


def ladders(scores: Table1) -> list[Figure]:
    """The bars of each set of Table 1."""
    found = []
    for name, what in SETS.items():
        bars = []
        for model in MODELS:
            cell, colour = scores.scores[model][name], f"var(--{model})"
            bars.append(
                Bar(model, cell["exact_match"], colour, cell["interval"], PAPER[model][name])
            )
        bars.insert(2, Bar("best constant", scores.constants[name][1], "var(--constant)"))
        found.append(Figure(f"{name.upper()}: {what}", [Group(bars)]))
    return found


def kept(scores: Table1, parent: str, name: str) -> float | None:
    """The composed model's share of what a parent scores on a set, in percent."""
    before = scores.scores[parent][name]["exact_match"]
    return 100 * scores.scores["composed"][name]["exact_match"] / before if before else None


def with_parts(runs: Sequence[Run]) -> list[Run]:
    """The runs, with the parts of each composed run before it."""
    return [one for run in runs for one in (*run.parts, run)]


def scores_by_task(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every task with the scores of all that were scored on it: pairs, their parts, other runs.

    `constant` is the share of the best constant answer in percent, None where the metric is not
    exact match or no prediction is left to tell it. `figure` is None where the scores are not of
    100, and of the rows of a group, which would be too many; `cells` are the scores, in words.
    """
    scored = with_parts(runs)
    tasks = dict.fromkeys(task for run in scored for task in run.scores)
    found = []
    for task in tasks:
        mine = [run for run in scored if task in run.scores]
        cell = mine[-1].scores[task]
        is_exact = metric_table.main_name(cell) == "exact_match"
        targets = [r["targets"] for r in mine[-1].predictions[task] if is_exact]
        constant = metrics.best_constant(targets)[1] if targets else None
        bars = [
            Bar(run.name, metric_table.main_value(cell), run_colour(run), cell["interval"])
            for run in mine
            for cell in [run.scores[task]]
        ]
        if constant is not None:
            bars.append(Bar("best constant answer", constant, "var(--constant)"))
        is_drawn = "group" not in cell and all(bar.value <= 100 for bar in bars)
        is_drawn &= not metric_table.find(metric_table.main_name(cell)).descends
        found.append(
            {
                "task": task,
                "runs": mine,
                "constant": constant,
                "figure": Figure(task, [Group(bars)]) if is_drawn else None,
                "cells": [(run, _shown(run.scores[task])) for run in mine],
            }
        )
    return found


def _shown(cell: Mapping[str, Any]) -> dict[str, Any]:
    name = metric_table.main_name(cell)
    digits = metric_table.find(name).digits
    low, high = cell["interval"]
    return {
        "metric": name,
        "value": f"{metric_table.main_value(cell):.{digits}f}",
        "interval": f"{low:.{digits}f}–{high:.{digits}f}",
        "others": ", ".join(f"{x} {cell[x]:.1f}" for x in cell.get("intervals", ()) if x != name),
        "empty": cell.get("empty", "not known"),
        "count": cell["count"],
    }


def grouped(runs: Sequence[Run]) -> list[tuple[Run, groups.Group]]:
    """The groups of rows of every run and part, beside the anchor's where it was scored."""
    found = []
    for run in runs:
        name = f"{run.name}: anchor alone"
        anchor = next((part.scores for part in run.parts if part.name == name), None)
        for one in (*run.parts, run):
            of_one = groups.groups(one.scores, anchor if one is run else None)
            found += [(one, group) for group in of_one]
    return found


def breakdown(runs: Sequence[Run]) -> list[Figure]:
    """Figures of accuracy by operands: of pairs on seen and unseen keys, of all on each set."""
    figures = []
    for run in runs:
        both = [
            (
                label,
                run.records(metric="exact_match", set="math", unseen=unseen),
                run_colour(run),
                not unseen,
            )
            for label, unseen in (("seen keys", False), ("unseen keys", True))
        ]
        if run.composed and all(records for _, records, *_ in both):
            title = f"MATH, seen and unseen keys: {run.name}"
            figures.append(Figure(title, _by_operands(both)))
    for name in reversed(SETS):
        series = [(run.name, expressions(run, name), run_colour(run), False) for run in runs]
        if parted := _by_operands(series):
            figures.append(Figure(f"{name.upper()}: {SETS[name]}", parted))
    return figures


def examples(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The same prompts answered by every run, some right and some wrong for a composed one."""
    answers = [
        (run, {r["inputs"]: r for r in (expressions(run, "math") or run.records()) if _judged(r)})
        for run in with_parts(runs)
    ]
    answers = [(run, records) for run, records in answers if records]
    if not answers:
        return None
    judge, records = next((pair for pair in answers if pair[0].composed), answers[-1])
    chosen = [
        record
        for right in (True, False)
        for record in _spaced([r for r in records.values() if r["correct"] == right], _EXAMPLES)
    ]
    return {
        "judge": judge,
        "wrong": sum(not record["correct"] for record in records.values()),
        "count": len(records),
        "runs": [run for run, _ in answers],
        "rows": [(r, [other.get(r["inputs"]) for _, other in answers]) for r in chosen],
    }


def _judged(record: Mapping[str, Any]) -> bool:
    return {"inputs", "targets", "prediction", "correct"} <= record.keys()


def _by_operands(series: Sequence[tuple[str, list, str, bool]]) -> list[Group]:
    """Groups of bars by number of operands, of (label, records, colour, faint)."""
    operands = sorted(
        {r["operands"] for _, records, *_ in series for r in records if "operands" in r}
    )
    parted = []
    for number in operands:
        bars, counts = [], []
        for label, records, colour, faint in series:
            asked = [record for record in records if record.get("operands") == number]
            if asked:
                cell = metrics.score(asked)
                value, low_high = cell["exact_match"], cell["interval"]
                bars.append(Bar(label, value, colour, low_high, faint=faint))
                counts.append(cell["count"])
        fewest, most = min(counts), max(counts)
        note = f"n = {most:,}" if fewest == most else f"n = {fewest:,}–{most:,}"
        parted.append(Group(bars, f"{number} operand{'s' if number > 1 else ''}", note))
    return parted


def _spaced(records: list, count: int) -> list:
    if len(records) <= count:
        return records
    return [records[index * len(records) // count] for index in range(count)]
