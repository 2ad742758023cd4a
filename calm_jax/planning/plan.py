"""One plan: what the training step of a config needs on a topology, read off the compiled step."""

import importlib.metadata
import math
import time
from typing import Any

from ml_collections import ConfigDict

import calm_jax
from calm_jax import sharding
from calm_jax.planning import collectives, counting, hlo, program, roofline, traffic
from calm_jax.planning.ideal import ideal_flops
from calm_jax.planning.topologies import Topology
from calm_jax.training.abstract_run import decoder_configs
from calm_jax.training.costs import tree_shards
from calm_jax.training.fitting import TooLarge
from calm_jax.training.run_model import composition_configs

Plan = dict[str, Any]


def make_plan(config: ConfigDict, topology: Topology) -> Plan:
    """Compiles the step of a config for a topology and says what it needs.

    Returns:
        JSON values: "config", "topology", "chips", "mesh", "batch_size", "length"; "memory" in
        bytes of one chip; "flops" of one chip and step; "collectives"; "seconds" of a step;
        "mfu_bound", the part of the peak that a step's indispensable arithmetic
        (`calm_jax.planning.ideal`) can come to. Where the step does not fit, "memory" and "flops"
        alone.

    Raises:
        CalmError: bad input, or no compiler for the topology.
    """
    mesh = sharding.make_mesh(config.mesh, program.devices(topology))
    traced = program.trace(config, mesh)
    chips = traced.mesh.size
    started = time.monotonic()
    trainable, opt_state, frozen, *_ = traced.arguments
    plan = {
        **what(config, topology, dict(traced.mesh.shape)),
        "compiled": True,
        "memory": {
            "trees": tree_shards(traced.parts, traced.shardings, trainable, opt_state, frozen),
            "available": topology.chip.hbm_bytes,
        },
        "flops": counting.flops(config) / chips,
        "versions": _versions(),
    }
    try:
        compiled, text = program.compile_program(traced)
    except TooLarge as error:
        plan["memory"] |= {"peak": error.needed, "fits": False}
        return plan
    plan["compile_seconds"] = round(time.monotonic() - started, 1)
    stats = compiled.memory_analysis()
    # The compiler drops what the step has no use for: an augment's layers above its last tap.
    held = sum(tree["bytes"] for tree in plan["memory"]["trees"])
    unused = max(0, held - stats.argument_size_in_bytes)
    peak = stats.peak_memory_in_bytes + unused
    plan["memory"] |= {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "host": stats.host_temp_size_in_bytes,
        "peak_of_step": stats.peak_memory_in_bytes,
        "unused": unused,
        "peak": peak,
        "fits": peak <= topology.chip.hbm_bytes,
    }
    module = hlo.parse(text)
    found = collectives.find(module, traced.mesh)
    links, network = roofline.communication(found, traced.mesh.devices.flat, topology)
    seconds = roofline.step_time(
        topology, plan["flops"], traffic.bytes_moved(module), links, network
    )
    return plan | {"collectives": collectives.totals(found)} | times(config, topology, seconds)


def what(config: ConfigDict, topology: Topology, mesh: dict[str, int]) -> Plan:
    """What a plan is of."""
    train = config.train
    return {
        "config": config.name,
        "models": [config.anchor, *config.augments] if config.kind == "composed" else ["decoder"],
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": mesh,
        "batch_size": train.batch_size,
        "accumulate": train.accumulate,
        "length": config.data.length,
        "attention": config.attention,
        "remat": train.remat,
        "weight_sharding": config.weight_sharding,
    }


def times(config: ConfigDict, topology: Topology, seconds: roofline.StepTime) -> Plan:
    """ "seconds", "bottleneck" and, of a composed model, "mfu_bound" of a plan."""
    bound = None
    if config.kind == "composed":
        anchor, *augments = decoder_configs(config)
        ideal = ideal_flops(
            anchor,
            augments,
            composition_configs(config),
            config.train.batch_size,
            config.data.length,
        ).total
        bound = ideal / (topology.chips * topology.chip.flops * seconds.bound)
    return {
        "seconds": seconds.parts | {"bound": seconds.bound, "serial": seconds.serial},
        "bottleneck": seconds.bottleneck,
        "mfu_bound": bound,
    }


def training(plan: Plan, tokens: float, dollars_per_chip_hour: float | None = None) -> Plan:
    """What training on that many tokens takes, from the bound and from the serial time of a step.

    Returns:
        "tokens", "steps", "hours" and "chip_hours" as [least, most], and "dollars" if priced.
    """
    steps = math.ceil(tokens / (plan["batch_size"] * plan["length"]))
    hours = [steps * plan["seconds"][key] / 3600 for key in ("bound", "serial")]
    chip_hours = [plan["chips"] * each for each in hours]
    cost = {"tokens": tokens, "steps": steps, "hours": hours, "chip_hours": chip_hours}
    if dollars_per_chip_hour is not None:
        cost["dollars"] = [dollars_per_chip_hour * each for each in chip_hours]
    return cost


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return {"calm_jax": calm_jax.__version__, **packages}
