"""The files that describe a run: what an evaluation leaves, and how a report reads it back."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from calm_jax.checkpoints.files import absolute, read_json, write_text
from calm_jax.errors import CalmError

# Key of summary.json that says what was scored and how; no task bears such a name.
MADE = "_run"
# The runs of the key-value experiment come first, in the order of the paper's Table 1.
_FIRST = ("augment", "anchor", "composed")


def evaluation_folder(workdir: epath.PathLike) -> epath.Path:
    return epath.Path(workdir) / "evaluation"


def predictions_file(workdir: epath.PathLike, task: str) -> epath.Path:
    name = task.removesuffix(".jsonl").replace("/", "_").lstrip("._")  # no hidden file
    return evaluation_folder(workdir) / f"{name}.jsonl"


def write_json_lines(path: epath.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_json_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The file's records; none where there is no file. Raises `CalmError` naming a bad line.

    A last line without its newline is still being written by the run, and is left out.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().decode().split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise CalmError(f"{path}:{number} is not JSON: {error}") from error
    return records


def read_optional(path: epath.Path) -> dict[str, Any]:
    """The file's JSON; empty where there is no file. Raises `CalmError` where it is damaged."""
    return read_json(path, "a run") if path.exists() else {}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory, read. What the run has not written yet is empty."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    costs: dict[str, Any]
    scores: dict[str, dict[str, Any]]  # by task: summary.json without its account
    made: dict[str, Any]  # summary.json's account of what was scored, when and with what
    predictions: dict[str, list[dict[str, Any]]]  # by task
    attention: dict[str, Any]

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

    def records(self, **fields: Any) -> list[dict[str, Any]]:
        """The predictions of all tasks whose metadata has these values."""
        return [
            record
            for records in self.predictions.values()
            for record in records
            if all(record.get(key) == value for key, value in fields.items())
        ]


def read_run(workdir: epath.PathLike) -> Run:
    """Reads a run directory. Raises `CalmError` without a config.json, or on unreadable JSON."""
    workdir = absolute(workdir)
    summary = read_optional(evaluation_folder(workdir) / "summary.json")
    made = summary.pop(MADE, {})
    return Run(
        name=workdir.name,
        config=read_json(workdir / "config.json", "a run"),
        metrics=read_json_lines(workdir / "metrics.jsonl"),
        costs=read_optional(workdir / "costs.json"),
        scores=summary,
        made=made,
        predictions={task: read_json_lines(predictions_file(workdir, task)) for task in summary},
        attention=read_optional(evaluation_folder(workdir) / "attention.json"),
    )


def read_runs(experiment: epath.PathLike) -> list[Run]:
    """The runs directly under a folder: augment, anchor, composed, then others by name.

    Raises `CalmError` where there is none.
    """
    experiment = absolute(experiment)
    if not experiment.exists():
        raise CalmError(f"experiment {experiment} does not exist")
    found = [path for path in experiment.iterdir() if (path / "config.json").exists()]
    if not found:
        raise CalmError(
            f"experiment {experiment} holds no run, that is, no folder with a config.json"
        )
    rank = {name: index for index, name in enumerate(_FIRST)}
    found.sort(key=lambda path: (rank.get(path.name, len(rank)), path.name))
    return [read_run(path) for path in found]


def compositions(run: Run) -> list[dict[str, Any]]:
    """The composition of each augment, as the run's config has it."""
    given = run.config.get("composition") or []
    return given if isinstance(given, list) else [given] * len(run.config.get("augments", [""]))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
