"""`calm train`: a decoder, or the bridge of a composed model."""

from calm_jax.checkpoints.files import absolute
from calm_jax.cli import config, members
from calm_jax.errors import CalmError
from calm_jax.quiet import quiet_libtpu
from calm_jax.shell import command_line

USAGE = """Trains what the config says, or continues where an earlier call stopped.

  calm train --config=configs/kv_compose.py --workdir=runs/kv/composed
  calm train --config=configs/kv_compose.py --workdir=runs/kv/wide --config.train.batch_size=256

WORKDIR then holds the run's config, checkpoints, metrics and costs, and a trained decoder as a
frozen folder (WORKDIR/frozen). If WORKDIR already holds a run, that run is continued; only mesh,
number of steps, logging, saving and the like may then change (docs/config.md lists the keys).
`calm train --config=FILE --help` lists every key with its value.

On several machines, start the same command on each. On Cloud TPU, GKE, SLURM and Open MPI the
processes find each other; elsewhere give --coordinator, --process_count and --process_index.
WORKDIR must be on a file system or bucket that all of them share.

Ctrl-C and SIGTERM finish the step and save it; a second signal ends the process at once. Exit
status: 0 finished, 2 bad input, 75 stopped by SIGTERM, 130 stopped by Ctrl-C, anything else a
failure, such as a lost process or a full disk. After all but 2, the same command continues, but
with --overwrite it begins anew."""


def _define_flags(define: config.Define) -> None:
    define("string", "config", "Python file whose get_config() returns the config")
    define("string", "workdir", "directory of the run")
    define("bool", "overwrite", "remove an earlier run and start anew", False)
    members.define_flags(define)


def main(argv: list[str]) -> int:
    values, run_config = config.parse(
        argv,
        USAGE,
        _define_flags,
        required=("config", "workdir"),
        load_config=lambda values: config.load_file(values.config),
    )
    file, workdir = absolute(values.config.partition(":")[0]), absolute(values.workdir)
    if values.overwrite and workdir in file.parents:
        raise CalmError(f"--overwrite would remove {file} with the run {workdir}")
    # Late, so that --help and a bad flag need not wait.
    from calm_jax.training.loop import train
    from calm_jax.training.preemption import Preemption

    quiet_libtpu()
    command = command_line("train", *argv)
    with Preemption() as preemption, members.joined(values):
        train(
            run_config,
            values.workdir,
            overwrite=values.overwrite,
            preemption=preemption,
            command=command,
        )
    return 0
