"""Counts in the traced step, for any mesh: its FLOPs, and the bytes for its backward pass."""

import math
from typing import Any

import jax
from ml_collections import ConfigDict

from calm_jax import sharding
from calm_jax.planning import program
from calm_jax.training.flops import jaxpr_flops, without_unused

_ONE_DEVICE = jax.sharding.AbstractMesh((1,) * len(sharding.MESH_AXES), sharding.MESH_AXES)


def flops(config: ConfigDict) -> int:
    """FLOPs of all matrix products in one step, attention at its full square.

    Counted with the attention backend "xla": the inside of a kernel cannot be counted.
    """
    return jaxpr_flops(_traced(config, "xla"))


def kept_bytes(config: ConfigDict) -> int:
    """Bytes, over all devices, that a step's layers keep for its backward pass.

    The step is traced with one micro-batch. An attention kernel keeps the same as "chunked":
    everything but the attention weights.
    """
    jaxpr = _traced(config, "xla" if config.attention == "xla" else "chunked")
    return _kept_by_loops(without_unused(jaxpr))


def _traced(config: ConfigDict, attention: str) -> Any:
    changed = ConfigDict(config)
    changed.train = ConfigDict({**config.train, "accumulate": 1})
    changed.attention = attention
    return program.trace(changed, _ONE_DEVICE).traced.jaxpr.jaxpr


def _kept_by_loops(jaxpr: Any) -> int:
    """Bytes that scans over layers return besides the residual stream.

    Scans that run in reverse are left out: they are the backward pass itself.
    """
    total = 0
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "scan":
            if not params["reverse"]:
                total += sum(
                    math.prod(x.aval.shape) * x.aval.dtype.itemsize
                    for x in equation.outvars[params["num_carry"] :]
                    if getattr(x.aval, "memory_space", None) != jax.memory.Space.Host
                )
            continue
        for value in params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += _kept_by_loops(inner)
    return total
