"""The cheapest way of running a config's step that fits: searched by formula, then compiled.

The config's own way is compiled too, so a search tells none that is known to be slower.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from calm_jax import units
from calm_jax.errors import CalmError
from calm_jax.models.execution import REMAT
from calm_jax.planning import plan
from calm_jax.planning.formula import Formula, abstract_mesh
from calm_jax.planning.topologies import Topology

COMPILED = 2  # of the candidates
TRIED = 4  # at most, where formulas were too hopeful


def candidates(config: ConfigDict, topology: Topology) -> list[tuple[ConfigDict, plan.Plan]]:
    """Every way of running the step of a config, with its plan by formula; the fastest first.

    Ways differ in mesh, micro-batches and rematerialisation; the batch, and so what is learnt, is
    that of the config. Those that offload come last: no formula knows the links to the host.
    """
    formula = Formula(config, topology)
    found = []
    for way in _ways(config, topology):
        try:
            found.append((way, formula.plan(way, abstract_mesh(way.mesh))))
        except CalmError:  # it divides no heads, no width or not the batch
            continue

    def rank(pair):
        train = pair[0].train
        return train.remat == "offload", pair[1]["seconds"]["serial"], train.accumulate

    return sorted(found, key=rank)


def cheapest(
    config: ConfigDict,
    topology: Topology,
    compile_plan: Callable[[ConfigDict, Topology], plan.Plan] = plan.make_plan,
) -> plan.Plan:
    """The plan of the fastest way that fits: the config's own, or one of the best by formula.

    Returns:
        the plan, compiled where the topology can be; "candidates" are the config's own way and the
        best by formula, with what the compiler found; "advice" says how to run it so.

    Raises:
        CalmError: no way fits by formula, or none that was compiled does.
    """
    found = candidates(config, topology)
    fitting = [pair for pair in found if pair[1]["memory"]["fits"]]
    if not fitting:
        raise CalmError(_nothing_fits(found, topology))
    plans = [guess for _, guess in fitting[: TRIED + COMPILED]]
    if not topology.compiled:
        return plans[0] | {"candidates": _rows(plans), "advice": advice(plans[0])}
    own = _own(config, topology, compile_plan)
    good: list[plan.Plan] = []
    tried, hopeful = 0, {}  # by how much formulas fell short, for each way of rematerialising
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
            f"{tried} ways that fit {topology.name} by formula were compiled, and none does; take "
            "a larger slice"
        )
    best = min(good, key=lambda each: each["seconds"]["serial"])
    return best | {"candidates": _rows(plans), "advice": advice(best)}


def _own(config: ConfigDict, topology: Topology, compile_plan) -> list[plan.Plan]:
    """The plan of the config as it is; none where its mesh is of other chips."""
    try:
        return [compile_plan(config, topology)]
    except CalmError:
        return []


def advice_by_formula(config: ConfigDict, topology: Topology) -> str:
    """What to change where a config's own way does not fit; nothing is compiled."""
    found = candidates(config, topology)
    fitting = [guess for _, guess in found if guess["memory"]["fits"]]
    return advice(fitting[0]) if fitting else _nothing_fits(found, topology)


def advice(best: plan.Plan) -> str:
    """The flags that make a run as a plan says."""
    keys = {f"mesh.{axis}": ways for axis, ways in best["mesh"].items() if axis != "slices"}
    keys |= {"train.accumulate": best["accumulate"], "train.remat": best["remat"]}
    keys |= {"weight_sharding": best["weight_sharding"]}
    flags = " ".join(f"--config.{key}={value}" for key, value in keys.items())
    how = "compiled" if best["compiled"] else "by formula"
    return f"The cheapest that fits, {how}: {flags}"


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
            # Over "all" is what a mesh does whose `data` is 1.
            way.weight_sharding = "fsdp"
            yield way


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _rows(plans: list[plan.Plan]) -> list[dict[str, Any]]:
    return [
        {key: each[key] for key in ("mesh", "accumulate", "remat", "weight_sharding", "compiled")}
        | {
            "peak": each["memory"]["peak"],
            "seconds": each["seconds"]["serial"] if "seconds" in each else None,
        }
        for each in plans
    ]


def _nothing_fits(found: list[tuple[ConfigDict, plan.Plan]], topology: Topology) -> str:
    if not found:
        return f"no mesh of the {topology.chips} chips of {topology.name} divides models and batch"
    least = min(guess["memory"]["peak"] for _, guess in found)
    return (
        f"no way of running the step fits on {topology.name}: by formula a chip needs at "
        f"least {units.size(least)} and has {units.size(topology.chip.hbm_bytes)}"
    )
