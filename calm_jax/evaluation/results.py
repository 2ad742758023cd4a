"""The files that describe a run: those that an evaluation writes, and how a report reads them."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from calm_jax.checkpoints.files import absolute, is_bucket, read_json, write_text
from calm_jax.checkpoints.kinds import COMPOSED_RUN, DECODER_RUN, kind_of
from calm_jax.errors import CalmError
from calm_jax.evaluation import metric_table
from calm_jax.text_files import parse_json

# Keys of summary.json besides the tasks: what was scored and how, and the scores of the parts.
SCORED, PARTS = "_run", "_parts"
# The runs of the key-value experiment come first, in the order of the paper's Table 1.
_FIRST = ("augment", "anchor", "composed")


def evaluation_folder(workdir: epath.PathLike) -> epath.Path:
    """The default folder of results, inside the folder of a run or a model."""
    return epath.Path(workdir) / "evaluation"


def predictions_file(evaluation: epath.PathLike, task: str) -> epath.Path:
    """The file of a task's predictions in the folder of an evaluation."""
    name = task.removesuffix(".jsonl").replace("/", "_").lstrip("._")  # no hidden file
    return epath.Path(evaluation) / f"{name}.jsonl"


def scores_of(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores of a summary.json by task."""
    return {task: score for task, score in summary.items() if task not in (SCORED, PARTS)}


def part_names(augments: int) -> list[str]:
    """What the parts of a composed model are called: "anchor", then "augment 0" and so on."""
    return ["anchor", *(f"augment {number}" for number in range(augments))]


def part_folder(evaluation: epath.Path, part: str) -> epath.Path:
    """The folder of a part's predictions; the evaluation's own for the composed model, ""."""
    return evaluation / part.replace(" ", "_") if part else evaluation


def write_json_lines(path: epath.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes one record on each line. Raises `CalmError` if the file cannot be written."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_json_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The file's records; none if there is no file. Raises `CalmError` naming a bad line.

    A last line without its newline is still being written by the run, and is left out.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [parse_json(line, path, number) for number, line in enumerate(lines, start=1)]


def read_optional(path: epath.Path) -> dict[str, Any]:
    """The file's JSON; empty if there is no file. Raises `CalmError` if it is damaged."""
    return read_json(path, "a run") if path.exists() else {}


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of a run directory. Fields that the run has not written yet are empty."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    commands: list[str]  # the command lines of `calm train` that made it
    costs: dict[str, Any]
    scores: dict[str, dict[str, Any]]  # by task, as of `metric_table.score`
    scored: dict[str, Any]  # which checkpoint was scored, with what settings, when and on what
    predictions: dict[str, list[dict[str, Any]]]  # by task
    attention: dict[str, Any]
    parts: tuple["Run", ...] = ()  # the anchor and the augments alone, where they were scored

    @property
    def composed(self) -> bool:
        return self.config.get("kind") == "composed"

    def curve(self, split: str, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric, in order of steps; finite values only.

        A run that was stopped and resumed may have logged a step twice: the later line counts.
        """
        points = {
            line["step"]: line[key]
            for line in self.metrics
            if line.get("split") == split and _is_finite(line.get(key))
        }
        steps = sorted(points)
        return steps, [points[step] for step in steps]

    def records(self, metric: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """The predictions whose metadata has these values, of all tasks or of those whose main
        metric is this one."""
        return [
            record
            for task, records in self.predictions.items()
            if metric in (None, metric_table.main_name(self.scores[task]))
            for record in records
            if all(record.get(key) == value for key, value in fields.items())
        ]


def read_run(workdir: epath.PathLike) -> Run:
    """Reads a run directory. Raises `CalmError` without a config.json, or on unreadable JSON."""
    workdir = absolute(workdir)
    evaluation = evaluation_folder(workdir)
    config = read_json(workdir / "config.json", "a run")
    summary = read_optional(evaluation / "summary.json")
    return Run(
        name=workdir.name,
        config=config,
        metrics=read_json_lines(workdir / "metrics.jsonl"),
        commands=read_optional(workdir / "commands.json").get("commands", []),
        costs=read_optional(workdir / "costs.json"),
        **_evaluated(evaluation, summary),
        attention=read_optional(evaluation / "attention.json"),
        parts=tuple(_read_parts(workdir.name, config, evaluation, summary)),
    )


def _read_parts(
    run: str, config: Mapping[str, Any], evaluation: epath.Path, summary: Mapping[str, Any]
) -> Iterator[Run]:
    """The parts of a composed run that were scored with it, or else in their own folders."""
    places = [config["anchor"], *config["augments"]] if "anchor" in config else []
    for name, place in zip(part_names(len(places) - 1), places, strict=False):
        folder, scores = part_folder(evaluation, name), summary.get(PARTS, {}).get(name)
        if scores is None and not is_bucket(place):  # a report needs no network
            folder = evaluation_folder(absolute(place))
            scores = read_optional(folder / "summary.json")
            if not _asked_alike(scores.get(SCORED, {}), summary.get(SCORED, {})):
                continue
        found = _evaluated(folder, {key: x for key, x in (scores or {}).items() if key in summary})
        if found["scores"]:
            short = name.removesuffix(" 0") if len(places) == 2 else name
            label = f"{run}: {short} alone"
            yield Run(label, {}, [], [], {}, **found, attention={})


def _asked_alike(part: Mapping[str, Any], pair: Mapping[str, Any]) -> bool:
    """Whether a part that was scored by itself had the examples and the options of the pair."""
    files = part.get("files", ())
    same = all(part.get(key) == pair.get(key) for key in ("limit", "options"))
    return same and all(one in files for one in pair.get("files", ()))


def _evaluated(folder: epath.Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Run` that an evaluation fills."""
    scores = scores_of(summary)
    return {
        "scores": scores,
        "scored": summary.get(SCORED, {}),
        "predictions": {task: read_json_lines(predictions_file(folder, task)) for task in scores},
    }


def read_runs(experiment: epath.PathLike) -> list[Run]:
    """The runs directly under a folder: augment, anchor, composed, then others by name.

    Other folders, such as frozen ones, are left out. Raises `CalmError` where there is no run.
    """
    experiment = absolute(experiment)
    if not experiment.exists():
        raise CalmError(f"experiment {experiment} does not exist")
    kinds = {
        path: kind_of(read_json(path / "config.json", "a run"))
        for path in sorted(experiment.iterdir())
        if (path / "config.json").exists()
    }
    found = [path for path, kind in kinds.items() if kind in (DECODER_RUN, COMPOSED_RUN)]
    if not found:
        others = [f"{path.name} is {kind}" for path, kind in kinds.items()]
        told = ", ".join(others[:3]) or "no folder in it has a config.json"
        raise CalmError(f"{experiment}: no runs here; {told}")
    rank = {name: index for index, name in enumerate(_FIRST)}
    found.sort(key=lambda path: (rank.get(path.name, len(rank)), path.name))
    return [read_run(path) for path in found]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
