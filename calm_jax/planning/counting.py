"""What can be counted in a traced step, whatever the mesh: FLOPs, and what it keeps."""

import math
from typing import Any

import jax
from jax.interpreters import partial_eval
from ml_collections import ConfigDict

from calm_jax import sharding
from calm_jax.planning import program
from calm_jax.training.costs import jaxpr_flops

_ALONE = jax.sharding.AbstractMesh((1,) * len(sharding.MESH_AXES), sharding.MESH_AXES)


def flops(config: ConfigDict) -> int:
    """FLOPs of all products of matrices in one step, attention at its full square.

    They are counted with XLA's attention: what is inside a kernel cannot be.
    """
    return jaxpr_flops(_jaxpr(config, "xla"))


def kept_bytes(config: ConfigDict) -> int:
    """Bytes on the devices that the layers of a step hand on to its backward pass, all together.

    Micro-batches are left out. Kernels of attention keep what "chunked" does: all but the weights.
    """
    return _kept_by_loops(_jaxpr(config, "xla" if config.attention == "xla" else "chunked"))


def alone(config: ConfigDict, attention: str = "xla") -> ConfigDict:
    """The config as it can be traced without devices, in one micro-batch."""
    changed = ConfigDict(config)
    changed.train = ConfigDict({**config.train, "accumulate": 1})
    changed.attention = attention
    return changed


def _jaxpr(config: ConfigDict, attention: str) -> Any:
    jaxpr = program.trace(alone(config, attention), _ALONE).traced.jaxpr.jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _kept_by_loops(jaxpr: Any) -> int:
    """What loops over layers give beside the residual stream; those that run in reverse are left
    out, being of the backward pass itself."""
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
