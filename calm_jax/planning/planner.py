"""`calm plan` as a function: checks the input, plans, prints and saves."""

from etils import epath
from ml_collections import ConfigDict

from calm_jax.checkpoints.files import absolute, check_writable, write_json, write_text
from calm_jax.errors import CalmError
from calm_jax.planning import compiled_plan, decoding, formula, page, program, search, topologies
from calm_jax.planning.compiled_plan import Plan
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
) -> Plan:
    """Plans a run, prints the plan, and saves it in `output` if given.

    Raises:
        CalmError: bad input, no compiler for the topology, or a folder that cannot be written.
    """
    found = topologies.find(topology)
    if dollars_per_chip_hour is not None and tokens is None:
        raise CalmError("--dollars_per_chip_hour needs --tokens")
    configuration.validate(config)
    if output is not None:
        check_writable(output)
    program.use_no_device()
    plan = _plan(config, found, search)
    if tokens is not None and "seconds" in plan:
        plan["training"] = compiled_plan.training_cost(plan, tokens, dollars_per_chip_hour)
    plan["decoding"] = decoding.of_plan(config, plan)
    plan["command"] = command
    print(page.text(plan), end="", flush=True)
    if output is not None:
        folder = absolute(output)
        write_json(folder / "plan.json", plan)
        write_text(folder / "plan.md", page.document(plan))
    return plan


def _plan(config: ConfigDict, topology: topologies.Topology, searched: bool) -> Plan:
    if searched:
        return search.cheapest(config, topology)
    if topology.compiled:
        plan = compiled_plan.make_plan(config, topology)
    else:
        plan = formula.Formula(config, topology).plan(config, formula.mesh_of(config, topology))
    if plan["memory"]["fits"]:
        return plan
    return plan | {"advice": search.advice_by_formula(config, topology)}
