"""What fits into a chip's memory: bytes of each tree, and the check before a run's first step."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax.models.parameters import Tree, count
from calm_jax.planning.topologies import GIB, chip_of
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


def memory_of(device: jax.Device) -> int | None:
    """Bytes that a program can have on a device, or None where that is not known."""
    if device.platform == "cpu":
        return None
    stats = device.memory_stats() or {}
    chip = chip_of(device.device_kind)
    return stats.get("bytes_limit") or (chip.hbm_bytes if chip else None)


def does_not_fit(needed: int, device: jax.Device) -> str | None:
    """Why a compiled step of `needed` bytes a device cannot run there; None if it can.

    To be asked after the step is compiled (`memory_analysis().peak_memory_in_bytes`) and before it
    runs.
    """
    available = memory_of(device)
    if available is None or needed <= available:
        return None
    return (
        f"a step needs {needed / GIB:.1f} GiB a device, but {device.device_kind} has "
        f"{available / GIB:.1f} GiB for it; {ADVICE}"
    )


ADVICE = (
    "raise train.accumulate, set train.remat=full or weight_sharding=all, or give mesh.fsdp and "
    "mesh.tensor more devices; `calm plan --search` finds out which"
)
