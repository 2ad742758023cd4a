"""What the arms of an experiment cost, measured while they trained and decoded."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from calm_jax.checkpoints.files import read_json
from calm_jax.evaluation.results import read_run
from calm_jax.evaluation.setting import median_speed
from calm_jax.experiment import decoding
from calm_jax.experiment.arms import Experiment, Job
from calm_jax.experiment.comparison import Row
from calm_jax.experiment.running import DONE


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A cost of training ÷ the same of fine-tuning the anchor."""

    arithmetic: float  # is counted, and the same on every machine
    time: float  # is measured


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an arm costs, from the run of its first seed; None where it was not measured."""

    parameters: int | None = None  # of all its trees but the optimizer
    trained: int | None = None  # those that are trained
    flops: float | None = None  # of a training token, forward and backward
    memory: int | None = None  # of the compiled training step at its peak, in bytes
    speed: float | None = None  # tokens a second of training, the median
    tokens: int | None = None  # that it was trained on, padding included
    seconds: float | None = None  # of the commands of its job, when they last ran
    latency: float | None = None  # milliseconds of a decoded token, one row
    throughput: float | None = None  # decoded tokens a second, eight rows
    # its training tokens ÷ those of its reference's augments: of the bridge, D_C's share
    share: float | None = None
    a_token: Ratio | None = None  # the cost of a training token ÷ one of fine-tuning the anchor
    # of its training ÷ fine-tuning the anchor on as many tokens as the augments saw
    whole: Ratio | None = None
    with_augments: Ratio | None = None  # the same with the training of the augments that it joins


def costs(
    experiment: Experiment, rows: Sequence[Row], speeds: Mapping[str, Mapping[str, float]]
) -> dict[str, Cost]:
    """The cost of each arm by name; `speeds` are the seconds of an answer (`decoding.measured`).

    An arm that only scores another's model has no costs but the seconds of scoring.
    """
    found = {row.arm.name: _measured(first_scored(row), speeds) for row in rows}
    base = found.get(experiment.finetuned, Cost())
    arms = {arm.name: arm for arm in experiment.arms}
    taught = [found.get(name, Cost()) for name in arms[experiment.reference].augments]
    if not taught or None in (base.flops, base.speed, *(one.tokens for one in taught)):
        return found
    all_tokens = sum(one.tokens for one in taught)
    whole = (all_tokens * base.flops, all_tokens / base.speed)
    related = {}
    for name, cost in found.items():
        if cost.tokens is None or cost.speed is None:
            related[name] = cost
            continue
        augments = [found.get(augment) for augment in arms[name].augments]
        is_known = augments and all(one and one.tokens and one.speed for one in augments)
        related[name] = dataclasses.replace(
            cost,
            share=cost.tokens / all_tokens,
            a_token=Ratio(cost.flops / base.flops, base.speed / cost.speed),
            whole=_ratio([cost], whole),
            with_augments=_ratio([cost, *augments], whole) if is_known else None,
        )
    return related


def first_scored(row: Row) -> Job:
    """The first of the arm's jobs that was scored."""
    return next(job for job in row.jobs if job.is_scored)


def _ratio(of: Sequence[Cost], whole: tuple[float, float]) -> Ratio:
    flops, seconds = whole
    return Ratio(
        sum(one.tokens * one.flops for one in of) / flops,
        sum(one.tokens / one.speed for one in of) / seconds,
    )


def _measured(job: Job, speeds: Mapping[str, Mapping[str, float]]) -> Cost:
    known: dict[str, Any] = {}
    if (job.folder / DONE).exists():
        known["seconds"] = read_json(job.folder / DONE, "a job")["seconds"]
    if times := speeds.get(job.arm.name):
        one, several = decoding.ROWS
        known["latency"] = 1000 * times[str(one)] / decoding.NEW
        known["throughput"] = several * decoding.NEW / times[str(several)]
    if not job.train:
        return Cost(**known)
    run = read_run(job.folder)
    trees = [tree for tree in run.costs.get("trees", ()) if tree["name"] != "optimizer"]
    if not trees:
        return Cost(**known)
    a_step = run.costs["tokens_per_step"]
    steps = max((line["step"] for line in run.metrics if line.get("split") == "train"), default=0)
    return Cost(
        parameters=sum(tree["parameters"] for tree in trees),
        trained=sum(tree["parameters"] for tree in trees if tree["trained"]),
        flops=run.costs["flops_per_step"] / a_step,
        memory=run.costs["memory_bytes"],
        speed=median_speed(run),
        tokens=steps * a_step,
        **known,
    )
