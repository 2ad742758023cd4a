"""What a run costs, known before its first step: parameters, bytes, compiled memory, FLOPs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from calm_jax.models import ComposedDecoder
from calm_jax.models.parameters import Tree, count, size_in_bytes
from calm_jax.training.step import Parts


def matmul_flops(function: Callable, *arguments) -> int:
    """FLOPs of all matrix products in one call of `function`, loops counted as often as they run.

    XLA's own count takes the body of a loop once, so the traced program is counted instead; two
    FLOPs a multiply-add, attention at its full square.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def tree_costs(parts: Parts, trainable: Tree, frozen: Tree, opt_state: Any) -> list[dict[str, Any]]:
    """For each tree: name, parameters, bytes, whether it is trained, forward FLOPs a token."""
    flops = _forward_flops(parts)
    if not parts.composed:
        trees = [("decoder", trainable, True)]
    else:
        augments = [(f"augment {k}", tree, False) for k, tree in enumerate(frozen["augments"])]
        trees = [("anchor", frozen["anchor"], False), *augments, ("bridge", trainable, True)]
    rows = [
        {
            "name": name,
            "parameters": count(tree),
            "bytes": size_in_bytes(tree),
            "trained": trained,
            "flops_per_token": flops[name],
        }
        for name, tree, trained in trees
    ]
    rows.append(
        {
            "name": "optimizer",
            "parameters": count(opt_state),
            "bytes": size_in_bytes(opt_state),
            "trained": False,
            "flops_per_token": None,
        }
    )
    return rows


def _forward_flops(parts: Parts, length: int = 32) -> dict[str, float]:
    """Forward FLOPs a token of each tree, for a row of `length` tokens, by tracing alone."""
    tokens_BT = jax.ShapeDtypeStruct((1, length), jnp.int32)
    tree = parts.structure.abstract()

    def flops(of: Callable[[Any], Callable]) -> float:
        # A single row cannot be split over a mesh.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return (
                matmul_flops(
                    lambda tree, tokens: of(parts.structure.merge(tree))(tokens), tree, tokens_BT
                )
                / length
            )

    if not parts.composed:
        return {"decoder": flops(lambda model: model.forward)}

    def whole(model: ComposedDecoder):
        return lambda tokens: model.forward(tokens, prompt_mask_BT=tokens)

    def anchor(model: ComposedDecoder):
        return model.anchor.forward

    result = {"anchor": flops(anchor)}
    for k in range(len(tree["augments"])):
        result[f"augment {k}"] = flops(
            lambda model, k=k: lambda tokens: model.run_augment(k, tokens).by_layer
        )
    result["bridge"] = flops(whole) - sum(result.values())
    return result


def jaxpr_flops(jaxpr) -> int:
    """`matmul_flops` of a program that is traced already.

    What nothing depends on is not counted, as no compiler keeps it: gradients of a backward pass of
    one's own that nobody asked for.
    """
    return _flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


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
    if name.startswith("dot_product_attention"):  # cuDNN's, which has no inside
        q_BTNH, k_BSKH = (variable.aval.shape for variable in equation.invars[:2])
        return (8 if "bwd" in name else 4) * math.prod(q_BTNH) * k_BSKH[1]
    return _times(name, params) * sum(_flops(jaxpr) for jaxpr in inside)


def _times(name: str, params: dict[str, Any]) -> int:
    """How often, over all devices, what is inside an equation runs."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1
