"""What the arms of an experiment reach: means over seeds, and differences, with intervals.

Axes: S seed, N example, R resample, K numbers of an example.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from calm_jax.errors import CalmError
from calm_jax.evaluation import metric_table
from calm_jax.evaluation.results import predictions_file, read_json_lines, read_optional, scores_of
from calm_jax.experiment.arms import Arm, Experiment, Job

RESAMPLES = 2000
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Cell:
    """An arm's score on a task."""

    metric: str  # the task's main metric
    values: tuple[float, ...]  # of each seed
    mean: float  # of the seeds
    interval: tuple[float, float]  # 95 % interval of the mean; seeds and examples are resampled
    group: str = ""  # the rows that the task belongs to, such as languages; "" of a task alone
    # from the reference, of the same seeds and examples; None of the reference itself, and where it
    # was not scored on the same examples by the same metric
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        """ "better" or "worse" than the reference if the interval agrees, else "even"."""
        if self.difference_interval is None:
            return ""
        low, high = self.difference_interval
        if low <= 0 <= high:
            return "even"
        return "better" if (low > 0) != metric_table.find(self.metric).descends else "worse"


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm with its cells by task, and the folders of its seeds; no cells if none was scored."""

    arm: Arm
    cells: Mapping[str, Cell]
    jobs: tuple[Job, ...]


@dataclasses.dataclass(frozen=True)
class GroupRow:
    """An arm's scores on the rows of a group."""

    arm: Arm
    mean: float
    count: int
    wins: int | None  # rows on which it is better than the anchor alone; None of the anchor itself


def group_tables(
    experiment: Experiment, rows: Sequence[Row]
) -> list[tuple[str, str, list[GroupRow]]]:
    """Each group of tasks with its metric, and the arms that were scored on all of its rows."""
    reference = next((row for row in rows if row.arm.name == experiment.reference), None)
    groups: dict[str, list[str]] = {}
    for task, cell in reference.cells.items() if reference else ():
        if cell.group:
            groups.setdefault(cell.group, []).append(task)
    found = []
    for group, tasks in groups.items():
        metric = metric_table.find(reference.cells[tasks[0]].metric)
        scored = [row for row in rows if row.cells.keys() >= set(tasks)]
        anchor = next((row for row in scored if row.arm.name == reference.arm.anchor), None)
        of_group = []
        for row in scored:
            means = [row.cells[task].mean for task in tasks]
            wins = None
            if anchor and row is not anchor:
                gains = [row.cells[task].mean - anchor.cells[task].mean for task in tasks]
                wins = sum((gain < 0) if metric.descends else (gain > 0) for gain in gains)
            of_group.append(GroupRow(row.arm, float(np.mean(means)), len(tasks), wins))
        found.append((group, metric.name, of_group))
    return found


def compare(experiment: Experiment, jobs: Sequence[Job]) -> list[Row]:
    """The rows of all arms, from the predictions that their jobs have stored."""
    by_arm = {arm.name: [job for job in jobs if job.arm is arm] for arm in experiment.arms}
    read = {name: _read(of_arm) for name, of_arm in by_arm.items()}
    rows = []
    for arm in experiment.arms:
        others = {} if arm.name == experiment.reference else read[experiment.reference]
        cells = {
            task: _cell(of_task, others.get(task), arm.name, task)
            for task, of_task in read[arm.name].items()
        }
        rows.append(Row(arm, cells, tuple(by_arm[arm.name])))
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class _Seed:
    """One seed's score, what it is a function of (`metric_table.Sums`), and its examples."""

    value: float
    values_NK: np.ndarray
    examples: list


@dataclasses.dataclass(frozen=True)
class _Scored:
    """A task's results by seed; an arm without seeds has the same for every one."""

    metric: metric_table.Metric
    group: str
    seeds: dict[int | None, _Seed]


def _read(jobs: Sequence[Job]) -> dict[str, _Scored]:
    found: dict[str, _Scored] = {}
    for job in jobs:
        for task, cell in scores_of(read_optional(job.results / "summary.json")).items():
            metric = metric_table.find(metric_table.main_name(cell))
            records = read_json_lines(predictions_file(job.results, task))
            examples = [(record.get("inputs"), record.get("targets")) for record in records]
            value, values_NK = metric_table.main_value(cell), metric.sums.of_records(records)
            of_task = found.setdefault(task, _Scored(metric, cell.get("group", ""), {}))
            of_task.seeds[job.seed if job.arm.seeded else None] = _Seed(value, values_NK, examples)
    return found


def _cell(mine: _Scored, other: _Scored | None, arm: str, task: str) -> Cell:
    seeds = list(mine.seeds.values())
    values = tuple(seed.value for seed in seeds)
    interval = _interval(mine.metric, [seeds], arm, task)
    cell = Cell(mine.metric.name, values, float(np.mean(values)), interval, mine.group)
    is_alike = other is not None and other.metric.name == mine.metric.name
    pairs = _paired(mine, other) if is_alike else []
    if not pairs or any(a.examples != b.examples for a, b in pairs):
        return cell
    interval = _interval(mine.metric, list(zip(*pairs, strict=True)), arm, task)
    difference = float(np.mean([a.value - b.value for a, b in pairs]))
    return dataclasses.replace(cell, difference=difference, difference_interval=interval)


def _interval(
    metric: metric_table.Metric, sides: Sequence[Sequence[_Seed]], arm: str, task: str
) -> tuple[float, float]:
    """The 95 % interval of the mean over seeds, or of the difference of two means.

    All seeds and both sides have the same examples, and are resampled alike.
    """
    first, *others = [seed.examples for side in sides for seed in side]
    if not first or any(examples != first for examples in others):
        raise CalmError(f"{task}: the seeds of {arm} were scored on different examples")
    S, N, random = len(sides[0]), len(first), np.random.default_rng(_SEED)
    drawn_RN = random.multinomial(N, np.full(N, 1 / N), size=RESAMPLES)
    drawn_RS = random.multinomial(S, np.full(S, 1 / S), size=RESAMPLES) / S
    means = []
    for side in sides:
        values = [metric.sums.value(drawn_RN @ seed.values_NK) for seed in side]
        means.append(np.sum(np.stack(values, axis=1) * drawn_RS, axis=1))
    sampled_R = means[0] if len(means) == 1 else means[0] - means[1]
    low, high = np.quantile(sampled_R, (0.025, 0.975))
    return float(low), float(high)


def _paired(mine: _Scored, other: _Scored) -> list[tuple[_Seed, _Seed]]:
    """The results of both for each seed that both have; one without seeds goes with each."""
    ours, theirs = mine.seeds, other.seeds
    if None in ours:
        return [(ours[None], each) for each in theirs.values()]
    if None in theirs:
        return [(each, theirs[None]) for each in ours.values()]
    return [(each, theirs[seed]) for seed, each in ours.items() if seed in theirs]
