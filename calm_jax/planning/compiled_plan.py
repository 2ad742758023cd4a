"""What the training step of a config needs on a topology, read from the compiled step."""

import importlib.metadata
import math
import time
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

import calm_jax
from calm_jax import sharding
from calm_jax.planning import collectives, counting, hlo, program, roofline, traffic
from calm_jax.planning.ideal import ideal_flops
from calm_jax.planning.topologies import Topology
from calm_jax.training.abstract_run import decoder_configs, own_lengths
from calm_jax.training.costs import tree_shards
from calm_jax.training.fitting import TooLarge
from calm_jax.training.run_model import composition_configs

Plan = dict[str, Any]


def make_plan(config: ConfigDict, topology: Topology) -> Plan:
    """Compiles the step of a config for a topology and says what it needs.

    Returns:
        a dictionary for JSON: "config", "topology", "chips", "mesh", "batch_size", "length",
        "own_lengths" (tokens in a row of each augment's own, or None);
        "memory" in bytes of one chip; "flops" of one chip and step; "collectives"; "seconds" of a
        step; "mfu_bound", the highest MFU that these seconds allow. If the step does not fit, it
        ends after "flops".

    Raises:
        CalmError: bad input, or no compiler for the topology.
    """
    mesh = sharding.make_mesh(config.mesh, program.devices(topology))
    traced = program.trace(config, mesh)
    chips, own = traced.mesh.size, own_lengths(config)
    started = time.monotonic()
    trainable, opt_state, frozen, *_ = traced.arguments
    plan = {
        **description(config, topology, dict(traced.mesh.shape), own),
        "compiled": True,
        "memory": {
            "trees": tree_shards(traced.parts, traced.shardings, trainable, opt_state, frozen),
            "available": topology.chip.hbm_bytes,
        },
        "flops": counting.flops(config) / chips,
        "versions": {
            "calm_jax": calm_jax.__version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        },
    }
    try:
        compiled, text = program.compile_program(traced)
    except TooLarge as error:
        plan["memory"] |= {"peak": error.needed, "fits": False}
        return plan
    plan["compile_seconds"] = round(time.monotonic() - started, 1)
    stats = compiled.memory_analysis()
    # The compiler drops unused arrays, such as layers above an augment's last tap.
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
    return plan | {"collectives": collectives.totals(found)} | times(config, topology, seconds, own)


def description(
    config: ConfigDict, topology: Topology, mesh: dict[str, int], own: Sequence[int | None]
) -> Plan:
    """The entries of a plan that describe the planned step."""
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
        "own_lengths": list(own),
        "attention": config.attention,
        "remat": train.remat,
        "weight_sharding": config.weight_sharding,
    }


def times(
    config: ConfigDict, topology: Topology, seconds: roofline.StepTime, own: Sequence[int | None]
) -> Plan:
    """The entries "seconds", "bottleneck" and, for a composed model, "mfu_bound" of a plan."""
    bound = None
    if config.kind == "composed":
        anchor, *augments = decoder_configs(config)
        ideal = ideal_flops(
            anchor,
            augments,
            composition_configs(config),
            config.train.batch_size,
            config.data.length,
            own,
        ).total
        bound = ideal / (topology.chips * topology.chip.flops * seconds.bound)
    return {
        "seconds": seconds.parts | {"bound": seconds.bound, "serial": seconds.serial},
        "bottleneck": seconds.bottleneck,
        "mfu_bound": bound,
    }


def training_cost(
    plan: Plan, tokens: float, dollars_per_chip_hour: float | None = None
) -> dict[str, Any]:
    """The least and most that training on `tokens` takes.

    Returns:
        "tokens" and "steps"; as [least, most] "hours", "chip_hours" and, if priced, "dollars".
    """
    steps = math.ceil(tokens / (plan["batch_size"] * plan["length"]))
    hours = [steps * plan["seconds"][key] / 3600 for key in ("bound", "serial")]
    chip_hours = [plan["chips"] * each for each in hours]
    cost = {"tokens": tokens, "steps": steps, "hours": hours, "chip_hours": chip_hours}
    if dollars_per_chip_hour is not None:
        cost["dollars"] = [dollars_per_chip_hour * each for each in chip_hours]
    return cost
