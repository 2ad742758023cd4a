"""What commands that load a model share: flags for its checkpoint, its parts and its mesh."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from calm_jax.cli import config
from calm_jax.programs import cache_programs

CACHE_DTYPES = ["float32", "bfloat16", "float16", "int8"]
CACHE_DTYPE = "dtype of the caches; default: the model's"
DRAFT = "most tokens that an augment drafts at a time; fewer or none where drafts do not pay"

MESH = {"slices": 0, "data": -1, "fsdp": 1, "tensor": 1}


def define_flags(define: config.Define) -> None:
    define("integer", "step", "checkpoint of a composed run; default: its best")
    define("string", "anchor", "where the anchor of a bridge is now, if it has moved")
    define("list", "augments", "where a bridge's augments are now, separated by commas")


def moved(values: flags.FlagValues) -> dict[str, Any]:
    """The arguments `anchor` and `augments` of `load_model`."""
    return {"anchor": values.anchor, "augments": values.augments}


def mesh_as_config(argv: Sequence[str]) -> list[str]:
    """`--mesh.KEY=VALUE` spelled as a key of the config, `--config.mesh.KEY=VALUE`."""
    return [re.sub(r"^--?mesh\.", "--config.mesh.", argument) for argument in argv]


def parse(
    argv: list[str], usage: str, define_flags: Callable[[config.Define], None]
) -> tuple[flags.FlagValues, dict[str, int] | None]:
    """The flags of a command that needs `--workdir`, and its mesh axes; None if none are given."""
    given = mesh_as_config(argv)
    values, settings = config.parse(
        given,
        usage,
        define_flags,
        required=("workdir",),
        load_config=lambda _: ConfigDict({"mesh": MESH}),
    )
    has_mesh = any(re.match(r"--?config\.mesh\.", argument) for argument in given)
    return values, settings.mesh.to_dict() if has_mesh else None


def load(values: flags.FlagValues, mesh: dict[str, int] | None) -> Any:
    """The model in `--workdir`, on a mesh of the given axes or on the first device."""
    from calm_jax.checkpoints.any_model import load_model
    from calm_jax.sharding import make_mesh

    cache_programs()
    return load_model(
        values.workdir,
        step=values.step,
        mesh=None if mesh is None else make_mesh(mesh),
        **moved(values),
    )
