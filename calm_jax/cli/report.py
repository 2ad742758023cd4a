"""`calm report`: the runs of an experiment as one page."""

from calm_jax.cli import config
from calm_jax.errors import CalmError
from calm_jax.shell import command_line

USAGE = """Turns the runs of an experiment into one HTML page that needs no network.

  calm report --experiment=runs/kv [--output=runs/kv/report.html]

EXPERIMENT holds run directories. If they are those of the key-value experiment (augment, anchor and
composed), Table 1 is also printed, and written to EXPERIMENT/table1.json."""


def _define_flags(define: config.Define) -> None:
    define("string", "experiment", "folder of run directories")
    define("string", "output", "the page; default: EXPERIMENT/report.html")


def main(argv: list[str]) -> int:
    values, _ = config.parse(argv, USAGE, _define_flags, required=("experiment",))

    from calm_jax.checkpoints.files import absolute, read_json
    from calm_jax.checkpoints.kinds import kind_of
    from calm_jax.evaluation.report import write_report

    folder = absolute(values.experiment)
    if (folder / "config.json").exists():
        kind = kind_of(read_json(folder / "config.json", "a run"))
        raise CalmError(
            f"--experiment={values.experiment} is itself {kind}; name the folder that holds the "
            f"runs, such as {folder.parent}"
        )
    command = command_line("report", *argv)
    print(write_report(values.experiment, values.output, command=command))
    return 0
