"""`calm evaluate`: score a run on its tasks."""

from absl import flags
from ml_collections import ConfigDict

from calm_jax.checkpoints.files import absolute, read_json
from calm_jax.checkpoints.kinds import COMPOSED_RUN, DECODER_RUN, kind_of
from calm_jax.cli import config
from calm_jax.errors import CalmError

USAGE = """Scores a run by exact match and writes every prediction to WORKDIR/evaluation, in place
of what an evaluation before left there.

  calm evaluate --workdir=runs/kv/composed [--step=2000] [--config.evaluate.limit=100]
  calm evaluate --workdir=runs/mine [--config.evaluate.tasks="('test.jsonl',)"]

What is scored stands in the run's config: evaluate.tasks, registered Tasks or files of JSON lines
(where there is none: the files of data.validation), evaluate.limit, evaluate.max_new_tokens and
mesh; each can be set anew by --config.evaluate.limit=… . Does nothing where the same checkpoint was
scored with the same settings before."""


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "directory of a run", flag_values=values)
    flags.DEFINE_integer(
        "step", None, "checkpoint of a composed run, otherwise its best", flag_values=values
    )


def _load_config(values: flags.FlagValues) -> ConfigDict:
    """What of the run's config an evaluation heeds."""
    path = absolute(values.workdir) / "config.json"
    run = read_json(path, "a run")
    if kind_of(run) not in (DECODER_RUN, COMPOSED_RUN):
        raise CalmError(f"{path.parent} is not a run but {kind_of(run)}")
    evaluated = run["evaluate"] | {"tasks": tuple(run["evaluate"]["tasks"])}  # JSON has lists
    return ConfigDict({"evaluate": evaluated, "mesh": run["mesh"]})


def main(argv: list[str]) -> int:
    """Runs the command; `argv` is what follows its name."""
    values, given = config.parse(
        argv, USAGE, _define, required=("workdir",), load_config=_load_config
    )

    from calm_jax.evaluation import metrics, results, runner
    from calm_jax.processes import refuse_several

    refuse_several("calm evaluate")
    summary = runner.evaluate(
        values.workdir,
        step=values.step,
        tasks=given.evaluate.tasks,
        limit=given.evaluate.limit,
        max_new_tokens=given.evaluate.max_new_tokens,
        mesh=given.mesh.to_dict(),
    )
    for task, score in summary.items():
        if task != results.MADE:
            print(f"{task}: {metrics.in_words(score)}")
            print(results.predictions_file(absolute(values.workdir), task))
    return 0
