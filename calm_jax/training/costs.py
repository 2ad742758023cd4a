"""The costs of each tree of a run, known before its first step: parameters, bytes and FLOPs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax.models import ComposedDecoder, Inputs
from calm_jax.models.parameters import Tree, count, size_in_bytes
from calm_jax.models.parts import Parts
from calm_jax.models.taps import item_shape
from calm_jax.training.flops import matmul_flops
from calm_jax.training.step import Shardings


def tree_costs(parts: Parts, trainable: Tree, opt_state: Any, frozen: Tree) -> list[dict[str, Any]]:
    """For each tree: name, parameters, bytes, whether it is trained, forward FLOPs per token."""
    flops = _forward_flops(parts)
    untrained = {"optimizer", *(name for name, tree in parts.named(frozen).items() if tree)}
    return [
        {
            "name": name,
            "parameters": count(tree),
            "bytes": size_in_bytes(tree),
            "trained": name not in untrained,
            "flops_per_token": flops.get(name),
        }
        for name, tree in _by_name(parts, trainable, opt_state, frozen).items()
    ]


def tree_shards(
    parts: Parts, shardings: Shardings, trainable: Tree, opt_state: Any, frozen: Tree
) -> list[dict[str, Any]]:
    """For each tree: name, parameters, and its bytes on one device."""
    trees = _by_name(parts, trainable, opt_state, frozen)
    split = _by_name(parts, shardings.trainable, shardings.opt_state, shardings.frozen)
    return [
        {"name": name, "parameters": count(tree), "bytes": shard_bytes(tree, split[name])}
        for name, tree in trees.items()
    ]


def shard_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a tree of arrays or shapes on one device, without padding of memory layouts."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )


def _by_name(parts: Parts, trainable: Tree, opt_state: Any, frozen: Tree) -> dict[str, Any]:
    """Each tree by name; a partly trained part of the model gives two trees."""
    trees: dict[str, Any] = {name: tree for name, tree in parts.named(frozen).items() if tree}
    for name, tree in parts.named(trainable).items():
        if tree:
            trees[f"{name}, trained" if name in trees else name] = tree
    return {**trees, "optimizer": opt_state}


def _own_inputs(model: Any, inputs: Inputs) -> tuple[Inputs | None, ...]:
    """What augments read that cannot read the anchor's tokens: one token for each of them, or one
    item of features in a row."""
    if not isinstance(model, ComposedDecoder):
        return ()
    found = []
    for augment, needed in zip(model.augments, model.own_tokens, strict=True):
        shape, own = item_shape(augment), inputs.replace(order_BT=inputs.tokens_BT)
        if shape is not None:
            order_BS = jnp.zeros((1, shape[0]), jnp.int32)
            features_BSF = jnp.zeros((1, *shape))
            own = Inputs(None, features_BSF, order_BT=order_BS, prompt_mask_BT=order_BS)
        found.append(own if needed else None)
    return tuple(found)


def _forward_flops(parts: Parts, length: int = 32) -> dict[str, float]:
    """Forward FLOPs per token of each tree, for a row of `length` tokens; nothing is compiled."""
    tokens_BT = jax.ShapeDtypeStruct((1, length), jnp.int32)
    tree = parts.structure.abstract()

    def flops(run: Callable[[Any, Inputs], Any]) -> float:
        def traced(tree, tokens_BT):
            model = parts.structure.merge(tree)
            inputs = Inputs(tokens_BT, prompt_mask_BT=tokens_BT)
            return run(model, inputs.replace(augments=_own_inputs(model, inputs)))

        # A single row cannot be split over a mesh.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return matmul_flops(traced, tree, tokens_BT) / length

    alone = {
        name: flops(lambda model, inputs, name=name: model.run_alone(name, inputs))
        for name in parts.names
        if name != "bridge"
    }
    whole = flops(lambda model, inputs: model.forward(inputs))
    return {name: alone.get(name, whole - sum(alone.values())) for name in parts.names}
