"""`calm report`: the runs of an experiment as one page."""

from absl import flags
from calm_jax.evaluation.report import write_report

USAGE = """Turns the runs of an experiment into one HTML page that needs no network.

  calm report --experiment=runs/kv [--output=runs/kv/report.html]

DIR holds run directories; of the key-value experiment augment, anchor and composed. Prints Table 1
and writes it to DIR/table1.json as well."""


def main(argv: list[str]) -> int:
    """Runs the command; `argv` is what follows its name."""
    values = flags.FlagValues()
    flags.DEFINE_string("experiment", None, "folder of run directories", flag_values=values)
    flags.DEFINE_string(
        "output", None, "the page; default EXPERIMENT/report.html", flag_values=values
    )
    values(["calm report", *argv])
    print(write_report(values.experiment, values.output))
    return 0
