"""The fastest way of running a config's step that fits: ranked by formula, then compiled.

The config's own way is also compiled, so that a search never recommends a slower one.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from calm_jax import units
from calm_jax.errors import CalmError
from calm_jax.models.execution import REMAT
from calm_jax.planning import compiled_plan
from calm_jax.planning.compiled_plan import Plan
from calm_jax.planning.formula import Formula, abstract_mesh
from calm_jax.planning.topologies import Topology

COMPILED = 2  # candidates that must fit when compiled
TRIED = 4  # most candidates to compile, if formulas were too optimistic


def candidates(config: ConfigDict, topology: Topology) -> list[tuple[ConfigDict, Plan]]:
    """Every way of running the step of a config, with its plan by formula; the fastest first.

    Ways differ in mesh, micro-batches and rematerialisation. All have the config's batch, so they
    learn the same. Those that offload come last: no formula models the links to the host.
    """
    formula = Formula(config, topology)
    found = []
    for way in _ways(config, topology):
        try:
            found.append((way, formula.plan(way, abstract_mesh(way.mesh))))
        except CalmError:  # the mesh does not divide heads, widths or the batch
            continue

    def rank(pair):
        train = pair[0].train
        return train.remat == "offload", pair[1]["seconds"]["serial"], train.accumulate

    return sorted(found, key=rank)


def cheapest(
    config: ConfigDict,
    topology: Topology,
    compile_plan: Callable[[ConfigDict, Topology], Plan] = compiled_plan.make_plan,
) -> Plan:
    """The plan of the fastest way that fits: the config's own, or one of the best by formula.

    Returns:
        the plan, compiled if there is a compiler for the topology. Its "candidates" are the
        config's own way and the best by formula, with the compiler's figures for those compiled;
        its "advice" has the flags to run it.

    Raises:
        CalmError: no way fits by formula, or no compiled way fits.
    """
    found = candidates(config, topology)
    fitting = [pair for pair in found if pair[1]["memory"]["fits"]]
    if not fitting:
        raise CalmError(_nothing_fits(found, topology))
    plans = [guess for _, guess in fitting[: TRIED + COMPILED]]
    if not topology.compiled:
        return plans[0] | {"candidates": _rows(plans), "advice": advice(plans[0])}
    own = _own(config, topology, compile_plan)
    good: list[Plan] = []
    tried, hopeful = 0, {}  # compiled peak / peak by formula, by rematerialisation
    for number, (way, guess) in enumerate(fitting):
        needed = guess["memory"]["peak"] * hopeful.get(way.train.remat, 1.0)
        if tried == TRIED or len(good) == COMPILED:
            break
        if needed > topology.chip.hbm_bytes:
            continue
        made = compile_plan(way, topology)
        tried += 1
        if number < len(plans):
            plans[number] = made
        else:
            plans.append(made)
        if made["memory"]["fits"]:
            good.append(made)
        elif made["memory"]["peak"]:
            hopeful[way.train.remat] = made["memory"]["peak"] / guess["memory"]["peak"]
    plans = own + plans
    good = [each for each in own if each["memory"]["fits"]] + good
    if not good:
        raise CalmError(
            f"{tried} ways that fit {topology.name} by formula were compiled, but none fits; "
            "take a larger slice"
        )
    best = min(good, key=lambda each: each["seconds"]["serial"])
    return best | {"candidates": _rows(plans), "advice": advice(best)}


def _own(config: ConfigDict, topology: Topology, compile_plan) -> list[Plan]:
    """The plan of the config as it is; none if its mesh does not match the topology."""
    try:
        return [compile_plan(config, topology)]
    except CalmError:
        return []


def advice_by_formula(config: ConfigDict, topology: Topology) -> str:
    """What to change, by formula alone, if a config's own way does not fit."""
    found = candidates(config, topology)
    fitting = [guess for _, guess in found if guess["memory"]["fits"]]
    return advice(fitting[0]) if fitting else _nothing_fits(found, topology)


def advice(best: Plan) -> str:
    """A sentence with the flags that run a step as planned."""
    keys = {f"mesh.{axis}": ways for axis, ways in best["mesh"].items() if axis != "slices"}
    keys |= {"train.accumulate": best["accumulate"], "train.remat": best["remat"]}
    keys |= {"weight_sharding": best["weight_sharding"]}
    flags = " ".join(f"--config.{key}={value}" for key, value in keys.items())
    how = "compiled" if best["compiled"] else "by formula"
    return f"The fastest way that fits, {how}: {flags}"


def _ways(config: ConfigDict, topology: Topology) -> Iterator[ConfigDict]:
    chips, rows = topology.chips_per_slice, config.train.batch_size
    remats = [remat for remat in REMAT if remat != "offload" or topology.compiled]
    for tensor, fsdp in itertools.product(_divisors(chips), repeat=2):
        if chips % (tensor * fsdp):
            continue
        mesh = {"data": chips // (tensor * fsdp), "fsdp": fsdp, "tensor": tensor}
        for accumulate, remat in itertools.product(_divisors(rows), remats):
            way = ConfigDict(config)
            way.mesh = ConfigDict({"slices": topology.slices, **mesh})
            way.train = ConfigDict({**config.train, "accumulate": accumulate, "remat": remat})
            # A mesh whose `data` is 1 covers "all".
            way.weight_sharding = "fsdp"
            yield way


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _rows(plans: list[Plan]) -> list[dict[str, Any]]:
    return [
        {key: each[key] for key in ("mesh", "accumulate", "remat", "weight_sharding", "compiled")}
        | {
            "peak": each["memory"]["peak"],
            "seconds": each["seconds"]["serial"] if "seconds" in each else None,
        }
        for each in plans
    ]


def _nothing_fits(found: list[tuple[ConfigDict, Plan]], topology: Topology) -> str:
    if not found:
        return f"{topology.name}: no mesh of its {topology.chips} chips divides models and batch"
    least = min(guess["memory"]["peak"] for _, guess in found)
    return (
        f"no way of running the step fits on {topology.name}: by formula a chip needs at "
        f"least {units.size(least)} and has {units.size(topology.chip.hbm_bytes)}"
    )
