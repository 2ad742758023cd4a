"""The page of an experiment, one HTML file that needs no network, and its results as JSON."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from calm_jax.checkpoints.files import write_json, write_text
from calm_jax.evaluation import metric_table, training_sections
from calm_jax.evaluation.page import environment
from calm_jax.evaluation.results import predictions_file, read_json_lines, read_run
from calm_jax.evaluation.setting import installed
from calm_jax.experiment import decoding, figures
from calm_jax.experiment.arms import KINDS, Experiment, Job
from calm_jax.experiment.comparison import Cell, Row, compare, group_tables
from calm_jax.experiment.costs import Cost, costs, first_scored
from calm_jax.experiment.running import DONE, is_done
from calm_jax.shell import command_line

EXAMPLES = 200  # prompts of the main task whose answers are on the page


def write_page(experiment: Experiment, jobs: Sequence[Job], folder: epath.Path, command: str):
    """Writes `report.html` and `results.json` into the experiment's folder; returns both paths.

    Raises:
        CalmError: seeds of an arm that were scored on different examples, or a damaged file.
    """
    order = list(KINDS)
    rows = [row for row in compare(experiment, jobs) if row.cells]
    rows.sort(key=lambda row: order.index(row.arm.kind))
    reference = next((row for row in rows if row.arm.name == experiment.reference), None)
    scored, speeds = tasks(experiment, rows), decoding.measured(folder)
    of_arms = costs(experiment, rows, speeds["seconds"])
    results, page = folder / "results.json", folder / "report.html"
    write_json(results, {row.arm.name: _as_json(row, of_arms[row.arm.name]) for row in rows})
    template = environment().get_template("experiment.html")
    write_text(
        page,
        template.render(
            experiment=experiment,
            seeds=_seeds(experiment, reference),
            answer=answer(experiment, rows, scored),
            kinds=[
                (kind, label, [r for r in rows if r.arm.kind == kind])
                for kind, label in KINDS.items()
            ],
            tasks=scored,
            of_groups={
                task: cell.group for row in rows for task, cell in row.cells.items() if cell.group
            },
            figures=[figure for task in scored if (figure := figures.bars(task, rows))],
            groups=group_tables(experiment, rows),
            gains=figures.gains(experiment, rows),
            bridge=_bridge(reference),
            curves=figures.curves(experiment, rows, scored),
            digits=lambda cell: metric_table.find(cell.metric).digits,
            costs=[(row, of_arms[row.arm.name]) for row in rows],
            titles={arm.name: arm.title for arm in experiment.arms},
            decoding=decoding,
            device=speeds["device"],
            examples=_examples(experiment, rows, scored),
            missing=[str(job) for job in jobs if not job.is_scored],
            stale=[str(job) for job in jobs if job.is_scored and _is_stale(job)],
            commands=[command_line(*line) for row in rows for line in row.jobs[0].commands],
            command=command,
            today=datetime.date.today().isoformat(),
            versions=", ".join(f"{name} {version}" for name, version in installed().items()),
        ),
    )
    return page, results


def answer(experiment: Experiment, rows: Sequence[Row], scored: Sequence[str]) -> str:
    """The experiment's question answered in a sentence or two, from the first of `scored` tasks."""
    task = next(iter(scored), experiment.tasks[0])
    reference = next(arm for arm in experiment.arms if arm.name == experiment.reference).title
    by_name = {row.arm.name: row for row in rows if task in row.cells}
    if experiment.reference not in by_name:
        return f"{reference} has no score on {task} yet."
    mine = by_name[experiment.reference].cells[task]
    words = f"On {task}, {reference} reaches {_shown(mine)}"
    parts = [row for row in by_name.values() if row.arm.kind == "part"]
    if parts:
        best = _best(parts, task)
        words += f"; the better part alone, {best.arm.title}, {_shown(best.cells[task])}"
    rivals = [
        row
        for name, row in by_name.items()
        if row.arm.kind == "baseline" and name != experiment.reference
    ]
    if rivals:
        best = _best(rivals, task)
        verdict = best.cells[task].verdict
        words += f". Of the baselines {best.arm.title} is the best with {_shown(best.cells[task])}"
        words += {"better": ", better", "worse": ", worse", "even": ", not clearly different"}.get(
            verdict, ""
        )
    controls = [row for row in by_name.values() if row.arm.kind == "control"]
    if controls:
        best = _best(controls, task)
        words += f". With its augment destroyed it keeps at most {_shown(best.cells[task])}"
        words += f" ({best.arm.title})"
    return words + "."


def tasks(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    """The names of the scored tasks, of which one entry of `experiment.tasks` may have several."""
    ordered = sorted(rows, key=lambda row: row.arm.name != experiment.reference)
    return list(dict.fromkeys(task for row in ordered for task in row.cells))


def _seeds(experiment: Experiment, reference: Row | None) -> str:
    """The number of seeds, and for how many of them the reference was scored."""
    asked = len(experiment.seeds)
    words = f"{asked} seed{'s' if asked > 1 else ''}"
    if reference is None:
        return f"0 of {words}"
    scored = min(len(cell.values) for cell in reference.cells.values())
    return f"{scored} of {words}" if reference.arm.seeded and scored < asked else words


def _is_stale(job: Job) -> bool:
    """Whether a job was run here with other commands, or its folder has been moved."""
    return (job.folder / DONE).exists() and not is_done(job)


def _bridge(reference: Row | None) -> dict[str, Any] | None:
    """What the connections of the reference add, and look at; None if it is no composed run."""
    if reference is None or not reference.arm.anchor:
        return None
    runs = [read_run(first_scored(reference).folder)]
    return {"usage": training_sections.usage(runs), "attention": training_sections.attention(runs)}


def _as_json(row: Row, of_row: Cost) -> dict[str, Any]:
    cells = {
        task: dataclasses.asdict(cell) | {"verdict": cell.verdict}
        for task, cell in row.cells.items()
    }
    return {"kind": row.arm.kind, "tasks": cells, "cost": dataclasses.asdict(of_row)}


def _examples(
    experiment: Experiment, rows: Sequence[Row], scored: Sequence[str]
) -> dict[str, Any] | None:
    """Answers of the first seed to the main task, first those that only the pair gets right.

    Those of ablations and controls are left out, since a page is not wide enough, and of arms that
    had other prompts.
    """
    task, left_out = next(iter(scored), ""), ("ablation", "control")
    shown = [
        row
        for row in rows
        if task in row.cells
        and (row.arm.kind not in left_out or row.arm.name == experiment.reference)
    ]
    answers = {
        row.arm.name: read_json_lines(predictions_file(first_scored(row).results, task))
        for row in shown
    }
    asked = _asked(answers.get(experiment.reference, ()))
    if not asked or not all(a and "prediction" in a[0] for a in answers.values()):
        return None
    shown = [row for row in shown if _asked(answers[row.arm.name]) == asked]
    reference = next(n for n, row in enumerate(shown) if row.arm.name == experiment.reference)
    parts = [n for n, row in enumerate(shown) if row.arm.kind == "part"]

    def rank(example: tuple) -> int:
        """0: only the pair is right; then only a part; then all or none."""
        if "correct" not in example[reference]:
            return 0
        mine = example[reference]["correct"]
        theirs = any(example[n]["correct"] for n in parts)
        return 0 if mine and not theirs else 1 if theirs and not mine else 2

    columns = [answers[row.arm.name] for row in shown]
    together = sorted(zip(*columns, strict=True), key=rank)
    return {"rows": shown, "examples": together[:EXAMPLES], "count": len(together)}


def _asked(records: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    return [(record.get("inputs"), record.get("targets")) for record in records]


def _best(rows: Sequence[Row], task: str) -> Row:
    descends = metric_table.find(rows[0].cells[task].metric).descends
    return (min if descends else max)(rows, key=lambda row: row.cells[task].mean)


def _shown(cell: Cell) -> str:
    metric, (low, high) = metric_table.find(cell.metric), cell.interval
    digits = metric.digits
    return f"{cell.mean:.{digits}f}{metric.unit} [{low:.{digits}f}–{high:.{digits}f}]"
