"""Table 1 of the paper (arXiv 2401.02412 §4.1) from the predictions of three runs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from calm_jax.evaluation import metrics
from calm_jax.evaluation.results import Run

MODELS = {"augment": "Augment m_A", "anchor": "Anchor m_B", "composed": "Composed"}
SETS = {
    "subs": "values in place of keys",
    "num": "arithmetic on plain numbers",
    "math": "arithmetic on unseen keys",
}
PAPER = {
    "augment": {"subs": 98.1, "num": 4.2, "math": 0.7},
    "anchor": {"subs": 0.0, "num": 73.7, "math": 0.0},
    "composed": {"subs": 92.9, "num": 72.0, "math": 84.3},
}


@dataclasses.dataclass(frozen=True)
class Table1:
    """`scores[model][set]` as of `metrics.score`; `constants[set]` as (answer, percent)."""

    scores: dict[str, dict[str, dict[str, Any]]]
    constants: dict[str, tuple[str, float]]
    same_expressions: bool  # whether the three models were asked the same

    @property
    def counts(self) -> dict[str, int]:
        """Expressions of each set: the fewest that any of the models was asked."""
        return {name: min(row[name]["count"] for row in self.scores.values()) for name in SETS}

    def percentages(self) -> dict[str, dict[str, float]]:
        """Exact match by model and set, in percent: what table1.json holds."""
        return {
            model: {name: cell["exact_match"] for name, cell in row.items()}
            for model, row in self.scores.items()
        }


def expressions(run: Run, name: str) -> list[dict[str, Any]]:
    """The predictions of a run on one set: of MATH those whose keys the bridge never saw."""
    unseen = {"unseen": True} if name == "math" else {}
    return run.records(metric="exact_match", set=name, **unseen)


def table1(runs: Sequence[Run]) -> Table1 | None:
    """The table, or None where one of the three models has not been scored on one of the sets."""
    by_name = {run.name: run for run in runs}
    if any(model not in by_name for model in MODELS):
        return None
    asked = {model: {name: expressions(by_name[model], name) for name in SETS} for model in MODELS}
    if not all(records for row in asked.values() for records in row.values()):
        return None
    questions = [
        {name: sorted(record["inputs"] for record in row[name]) for name in SETS}
        for row in asked.values()
    ]
    return Table1(
        scores={
            model: {name: metrics.score(records) for name, records in row.items()}
            for model, row in asked.items()
        },
        constants={
            name: metrics.best_constant(record["targets"] for record in asked["composed"][name])
            for name in SETS
        },
        same_expressions=all(row == questions[0] for row in questions),
    )


def percent(value: float) -> str:
    return f"{value:.1f}"


def interval(low_high: Sequence[float]) -> str:
    return f"{percent(low_high[0])}–{percent(low_high[1])}"


def as_text(table: Table1) -> str:
    """The table for a terminal: exact match in percent, 95 % interval, the paper's figure."""
    header = ["exact match, %", *(f"{name.upper()} (paper)" for name in SETS)]
    rows = [header]
    for model, label in MODELS.items():
        if model == "composed":
            constants = (f"{percent(table.constants[name][1])}" for name in SETS)
            rows.append(["Best constant answer", *constants])
        cells = (table.scores[model][name] for name in SETS)
        rows.append(
            [label]
            + [
                f"{percent(cell['exact_match'])} [{interval(cell['interval'])}] ({paper})"
                for cell, paper in zip(cells, PAPER[model].values(), strict=True)
            ]
        )
    rows.append(["Expressions", *(f"{count:,}" for count in table.counts.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
