"""What each tree of a run costs, known before its first step: parameters, bytes and FLOPs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax.models import ComposedDecoder
from calm_jax.models.parameters import Tree, count, size_in_bytes
from calm_jax.training.flops import matmul_flops
from calm_jax.training.step import Parts, Shardings


def tree_costs(parts: Parts, trainable: Tree, opt_state: Any, frozen: Tree) -> list[dict[str, Any]]:
    """For each tree: name, parameters, bytes, whether it is trained, forward FLOPs a token."""
    flops = _forward_flops(parts)
    return [
        {
            "name": name,
            "parameters": count(tree),
            "bytes": size_in_bytes(tree),
            "trained": tree is trainable,
            "flops_per_token": flops.get(name),
        }
        for name, tree in _by_name(parts, trainable, opt_state, frozen).items()
    ]


def tree_shards(
    parts: Parts, shardings: Shardings, trainable: Tree, opt_state: Any, frozen: Tree
) -> list[dict[str, Any]]:
    """For each tree: name, parameters, and the bytes that one device holds of it."""
    trees = _by_name(parts, trainable, opt_state, frozen)
    split = _by_name(parts, shardings.trainable, shardings.opt_state, shardings.frozen)
    return [
        {"name": name, "parameters": count(tree), "bytes": shard_bytes(tree, split[name])}
        for name, tree in trees.items()
    ]


def shard_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a tree of arrays or shapes that one device holds, without padding of layouts."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )


def _by_name(parts: Parts, trainable: Any, opt_state: Any, frozen: Any) -> dict[str, Any]:
    if not parts.composed:
        return {"decoder": trainable, "optimizer": opt_state}
    augments = {f"augment {k}": tree for k, tree in enumerate(frozen["augments"])}
    return {"anchor": frozen["anchor"], **augments, "bridge": trainable, "optimizer": opt_state}


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
