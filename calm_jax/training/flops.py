"""FLOPs of the matrix products in a traced program.

XLA counts the body of a loop once; here it counts for every iteration. A multiply-add is two FLOPs,
and attention counts all T x S logits. `calm_jax.planning.ideal` computes the same number from the
configs of the models; the tests compare the two.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import partial_eval  # JAX has no public way to drop unused equations


def matmul_flops(function: Callable, *arguments: Any) -> int:
    """FLOPs of all matrix products in one call of `function` on arrays or shapes."""
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def jaxpr_flops(jaxpr: Any) -> int:
    """`matmul_flops` of a traced program, without unused equations."""
    return _flops(without_unused(jaxpr))


def without_unused(jaxpr: Any) -> Any:
    """The program without unused equations, as compilers drop them.

    A custom backward pass, for example, may compute gradients that nothing uses.
    """
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _flops(jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * inner * math.prod(equation.outvars[0].aval.shape)
    inside = [
        getattr(value, "jaxpr", value)
        for param in params.values()
        for value in (param if isinstance(param, tuple | list) else [param])
        if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    if name == "cond":
        return max(_flops(branch) for branch in inside)
    if name.startswith("dot_product_attention"):  # cuDNN's kernel has no equations inside
        q_BTNH, k_BSKH = (variable.aval.shape for variable in equation.invars[:2])
        return (8 if "bwd" in name else 4) * math.prod(q_BTNH) * k_BSKH[1]
    return _runs(name, params) * sum(_flops(jaxpr) for jaxpr in inside)


def _runs(name: str, params: dict[str, Any]) -> int:
    """How many times the program inside an equation runs, over all devices."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1
