"""`calm train`: a decoder, or the bridge of a composed model."""

from absl import flags

from calm_jax.cli import config

USAGE = """Trains what the config says, and goes on where an earlier call stopped.

  calm train --config=configs/kv_compose.py --workdir=runs/kv/composed
  calm train --config=configs/kv_compose.py --workdir=runs/kv/wide --config.train.batch_size=256

The run's directory then holds its config, checkpoints, metrics and costs, and of a decoder the
finished model (WORKDIR/frozen). A directory that holds a run goes on with it: mesh, number of
steps, logging and saving may change, nothing else. `calm train --config=FILE --help` lists every
key with its value."""


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "config", None, "Python file whose get_config() says all", flag_values=values
    )
    flags.DEFINE_string("workdir", None, "directory of the run", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "start anew, removing an earlier run", flag_values=values)


def main(argv: list[str]) -> int:
    """Runs the command; `argv` is what follows its name."""
    values, run_config = config.parse(
        argv,
        USAGE,
        _define,
        required=("config", "workdir"),
        load_config=lambda values: config.load_file(values.config),
    )
    from calm_jax.training.loop import train  # late: --help and a bad flag need not wait

    train(run_config, values.workdir, overwrite=values.overwrite)
    return 0
