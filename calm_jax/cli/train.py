"""`calm train`: a decoder, or the bridge of a composed model."""

import shlex

from absl import flags

from calm_jax.cli import config
from calm_jax.quiet import quiet_libtpu

USAGE = """Trains what the config says, and goes on where an earlier call stopped.

  calm train --config=configs/kv_compose.py --workdir=runs/kv/composed
  calm train --config=configs/kv_compose.py --workdir=runs/kv/wide --config.train.batch_size=256

The run's directory then holds its config, checkpoints, metrics and costs, and of a decoder the
finished model (WORKDIR/frozen). A directory that holds a run goes on with it: mesh, number of
steps, logging and saving may change, nothing else. `calm train --config=FILE --help` lists every
key with its value.

On several machines start the same command on each: on Cloud TPU, GKE, SLURM and Open MPI the
processes find each other; elsewhere --coordinator, --process_count and --process_index tell. The
run's directory must be on a file system or bucket that all share.

SIGTERM finishes the step and saves; a second one ends at once. Exit status: 0 finished, 2 bad
input, 75 stopped by SIGTERM (start the same command again: it goes on), 130 interrupted, anything
else a failure, such as a lost process or a full disk; that command goes on too."""


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "config", None, "Python file whose get_config() says all", flag_values=values
    )
    flags.DEFINE_string("workdir", None, "directory of the run", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "start anew, removing an earlier run", flag_values=values)
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, which opens it", flag_values=values
    )
    flags.DEFINE_integer("process_count", None, "processes of the run", flag_values=values)
    flags.DEFINE_integer("process_index", None, "which one this is, from 0", flag_values=values)
    flags.DEFINE_integer(
        "coordinator_seconds",
        300,
        "how long the processes wait until all have found the coordinator",
        lower_bound=1,
        flag_values=values,
    )


def main(argv: list[str]) -> int:
    """Runs the command; `argv` is what follows its name."""
    values, run_config = config.parse(
        argv,
        USAGE,
        _define,
        required=("config", "workdir"),
        load_config=lambda values: config.load_file(values.config),
    )
    # Late: --help and a bad flag need not wait.
    from calm_jax.processes import joined
    from calm_jax.training.loop import train
    from calm_jax.training.preemption import Preemption

    quiet_libtpu()
    place = (values.coordinator, values.process_count, values.process_index)
    command = shlex.join(["calm", "train", *argv])
    with Preemption() as preemption, joined(*place, timeout=values.coordinator_seconds):
        train(
            run_config,
            values.workdir,
            overwrite=values.overwrite,
            preemption=preemption,
            command=command,
        )
    return 0
