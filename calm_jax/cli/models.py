"""What the commands that load a model share: flags for its checkpoint, its parts and its mesh."""

import re
from collections.abc import Sequence
from typing import Any

from absl import flags


def define(values: flags.FlagValues) -> None:
    """Defines `--step`, `--anchor` and `--augments`."""
    flags.DEFINE_integer(
        "step", None, "checkpoint of a composed run, otherwise its best", flag_values=values
    )
    flags.DEFINE_string(
        "anchor", None, "where the anchor of a bridge is now, if it has moved", flag_values=values
    )
    flags.DEFINE_list(
        "augments", None, "where its augments are now, separated by commas", flag_values=values
    )


def moved(values: flags.FlagValues) -> dict[str, Any]:
    """The arguments `anchor` and `augments` of `load_model`."""
    return {"anchor": values.anchor, "augments": values.augments}


def mesh_as_config(argv: Sequence[str]) -> list[str]:
    """`--mesh.KEY=VALUE` spelled as a key of the config, `--config.mesh.KEY=VALUE`."""
    return [re.sub(r"^--?mesh\.", "--config.mesh.", argument) for argument in argv]
