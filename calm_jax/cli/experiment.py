"""`calm experiment`: trains and scores every arm of an experiment, and writes its page."""

import json
import pathlib

from absl import flags

from calm_jax.checkpoints.files import absolute, check_writable
from calm_jax.cli import config
from calm_jax.errors import CalmError, RunFailed
from calm_jax.shell import command_line

USAGE = """Trains and scores every arm of an experiment with every seed, then writes its page.

  calm experiment --config=configs/table5_kv.py --workdir=runs/table5
  calm experiment --config=configs/table5_kv.py --workdir=runs/table5 --seeds=0 --arms=calm,lora
  calm experiment --config=configs/table5_kv.py --workdir=runs/table5 --commands

CONFIG is a Python file whose get_experiment() describes the arms, and whose get_config(ARM) returns
the config of an arm's training. Arms run one after another, each in processes of its own. What is
done is skipped, what was stopped goes on from its last checkpoint, and if an arm fails the others
still run. At the end all models decode in turns, and WORKDIR/costs.json keeps their times; then
WORKDIR/report.html and WORKDIR/results.json compare all arms with the reference.

--commands prints the commands instead, in groups: those of one group may run at the same time on
different machines. `launch/slurm_array.sh` and `launch/gke.sh experiment` take the list. The last
command measures decoding and writes the page."""


def _define_flags(define: config.Define) -> None:
    define("string", "config", "Python file with get_experiment() and get_config(ARM)")
    define("string", "workdir", "folder of all runs and the page")
    define("list", "arms", "only these, and those that they need; default: all")
    define("list", "seeds", "only these; default: those of the experiment")
    define("bool", "commands", "print the commands, run nothing", False)
    define("bool", "report_only", "only write the page, measure nothing", False)


def main(argv: list[str]) -> int:
    values, _ = config.parse(argv, USAGE, _define_flags, required=("config", "workdir"))

    from calm_jax.experiment import arms, running
    from calm_jax.training.config_keys import to_dict

    experiment = config.call_file(values.config, "get_experiment", arms.Experiment)
    folder = absolute(values.workdir)
    # On another machine the config may lie elsewhere, as it does in the image of launch/gke.sh.
    file = values.config if values.commands else str(pathlib.Path(values.config).resolve())
    configs = {
        arm.name: json.dumps(to_dict(config.load_file(f"{file}:{arm.name}")))
        for arm in experiment.arms
        if arm.is_trained
    }
    jobs = list(arms.jobs(experiment, file, folder, configs))
    chosen = _chosen(experiment, jobs, values)
    if values.commands:
        last = ["experiment", *(word for word in argv if word != "--commands")]
        for number, group in enumerate([*arms.groups(chosen), [last]], start=1):
            print("\n".join([f"# group {number}", *(command_line(*each) for each in group)]))
        return 0

    from calm_jax.experiment import decoding
    from calm_jax.experiment.page import write_page

    check_writable(folder)
    wrong = {} if values.report_only else running.run(chosen)
    try:
        if not values.report_only:
            decoding.measure(jobs, folder)
    finally:
        for path in write_page(experiment, jobs, folder, command_line("experiment", *argv)):
            print(path)
    if wrong:
        raise RunFailed(
            f"{len(wrong)} of {len(chosen)} jobs are not done: {', '.join(map(str, wrong))}"
        )
    return 0


def _chosen(experiment, jobs: list, values: flags.FlagValues) -> list:
    """The jobs of the chosen arms and seeds, and those that they need."""
    known = {arm.name: arm for arm in experiment.arms}
    wanted = list(values.arms or known)
    for name in wanted:
        if name not in known:
            raise CalmError(f"--arms={name}: there is no such arm; there are {', '.join(known)}")
    for name in wanted:  # grows while it is read
        wanted += [
            need for need in known[name].needs(known, experiment.flags) if need not in wanted
        ]
    seeds = [str(seed) for seed in experiment.seeds]
    for seed in values.seeds or ():
        if seed not in seeds:
            raise CalmError(f"--seeds={seed}: the experiment has the seeds {', '.join(seeds)}")
    chosen = values.seeds or seeds
    return [
        job
        for job in jobs
        if job.arm.name in wanted and (not job.arm.seeded or str(job.seed) in chosen)
    ]
