"""`calm plan`: what a run needs on machines that you do not have."""

import textwrap

from calm_jax.cli import config
from calm_jax.presets import PRESETS
from calm_jax.shell import command_line

USAGE = f"""Compiles the training step for a TPU slice, without one, and says what the step needs.

  calm plan --config=configs/gemma2_9b_2b.py --topology=v5e:4x4 --tokens=1e9
  calm plan --config=configs/gemma2_9b_2b.py --topology=v5e:16x16*2 --search --output=plans

It prints memory, arithmetic, traffic and time of a step on one chip, and writes them to OUTPUT as
plan.json and plan.md. TOPOLOGY is a slice as Cloud TPU names it; `*2` at its end means two slices.
h100:8 and h200:8 are planned by formula. --search ranks meshes, micro-batches and rematerialisation
by formula, then compiles the best two and the config's own.

Anchor and augments are frozen folders, or presets, which need no weights, such as
--config.anchor=preset:llama3.1_8b. The presets are

{textwrap.indent(textwrap.fill(", ".join(PRESETS), 98), "  ")}"""


def _define_flags(define: config.Define) -> None:
    define("string", "config", "Python file whose get_config() returns the config")
    define("string", "topology", "CHIP:SHAPE or CHIP:SHAPE*SLICES")
    define("float", "tokens", "tokens to train on", lower_bound=1)
    define("float", "dollars_per_chip_hour", "price, with --tokens", lower_bound=0)
    define("bool", "search", "look for the fastest way that fits", False)
    define("string", "output", "folder for plan.json and plan.md")


def main(argv: list[str]) -> int:
    values, run_config = config.parse(
        argv,
        USAGE,
        _define_flags,
        required=("config", "topology"),
        load_config=lambda values: config.load_file(values.config),
    )
    from calm_jax.planning import planner  # slow to import; --help need not wait for it

    plan = planner.run(
        run_config,
        values.topology,
        tokens=values.tokens,
        dollars_per_chip_hour=values.dollars_per_chip_hour,
        search=values.search,
        output=values.output,
        command=command_line("plan", *argv),
    )
    return 0 if plan["memory"]["fits"] else 1
