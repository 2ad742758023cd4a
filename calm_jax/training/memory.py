"""Bytes of each tree of a run on one chip."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax.models.parameters import Tree, count
from calm_jax.training.step import Parts, Shardings


def tree_rows(
    parts: Parts, shardings: Shardings, trainable: Tree, opt_state: Any, frozen: Tree
) -> list[dict[str, Any]]:
    """For each tree: name, parameters and bytes of them that one chip holds."""
    trees = [("bridge" if parts.composed else "decoder", trainable, shardings.trainable)]
    if parts.composed:
        pairs = zip(frozen["augments"], shardings.frozen["augments"], strict=True)
        augments = [(f"augment {k}", tree, place) for k, (tree, place) in enumerate(pairs)]
        trees = [("anchor", frozen["anchor"], shardings.frozen["anchor"]), *augments, *trees]
    trees.append(("optimizer", opt_state, shardings.opt_state))
    return [
        {"name": name, "parameters": count(tree), "bytes": bytes_of_one_chip(tree, places)}
        for name, tree, places in trees
    ]


def bytes_of_one_chip(tree: Any, places: Any) -> int:
    """Bytes of a tree of shapes that each device holds, without the padding of its layout."""
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
    )
