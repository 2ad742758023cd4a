"""`calm plan` as a function: checks, plans, prints and saves."""

import tempfile

from etils import epath
from ml_collections import ConfigDict

from calm_jax.checkpoints.files import absolute, is_bucket, write_json, write_text
from calm_jax.errors import CalmError
from calm_jax.planning import formula, page, plan, program, search, topologies
from calm_jax.training import configuration


def run(
    config: ConfigDict,
    topology: str,
    *,
    tokens: float | None = None,
    dollars_per_chip_hour: float | None = None,
    search: bool = False,
    output: epath.PathLike | None = None,
    command: str = "",
) -> plan.Plan:
    """Plans a run, prints the plan, and saves it where an output folder is given.

    Raises:
        CalmError: bad input, no compiler for the topology, or an output that cannot be written.
    """
    place = topologies.find(topology)
    if dollars_per_chip_hour is not None and tokens is None:
        raise CalmError("--dollars_per_chip_hour says nothing without --tokens")
    configuration.validate(config)
    if output is not None:
        _check_writable(absolute(output))
    program.use_no_device()
    made = _plan(config, place, search)
    if tokens is not None and "seconds" in made:
        made["training"] = plan.training(made, tokens, dollars_per_chip_hour)
    made["command"] = command
    shown = page.text(made)
    print(shown, end="", flush=True)
    if output is not None:
        folder = absolute(output)
        write_json(folder / "plan.json", made)
        write_text(folder / "plan.md", f"    {command}\n\n{shown}")
    return made


def _check_writable(folder: epath.Path) -> None:
    """Raises `CalmError` before minutes of compiling rather than after them; makes nothing."""
    if is_bucket(folder):
        return
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise CalmError(
            f"--output={folder}: cannot write in {nearest}: {error.strerror or error}"
        ) from None


def _plan(config: ConfigDict, place: topologies.Topology, searched: bool) -> plan.Plan:
    if searched:
        return search.cheapest(config, place)
    if place.compiled:
        made = plan.make_plan(config, place)
    else:
        made = formula.Formula(config, place).plan(config, formula.mesh_of(config, place))
    if made["memory"]["fits"]:
        return made
    return made | {"advice": search.advice_by_formula(config, place)}
