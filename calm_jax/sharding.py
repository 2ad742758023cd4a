"""Where every array lives: one mesh, one table from logical axes to mesh axes.

This is the only file that names mesh axes. Models name *logical* axes on their parameters and
activations; `RULES` says which mesh axis splits each of them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from calm_jax.errors import CalmError

MESH_AXES = ("data", "fsdp", "tensor")

# Parameters are split over `fsdp` along the model width and over `tensor` along heads, MLP features
# and vocabulary; activations over `data` and `fsdp` along the batch.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "activation_embed": None,
    "embed": "fsdp",
    "augment_embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
}

# Grouped queries may have fewer key heads than `tensor` has devices: then each device keeps all.
REPLICATED_WHEN_INDIVISIBLE = frozenset({"kv_heads"})


def make_mesh(shape: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all), with axes `data`, `fsdp`, `tensor`.

    `shape` gives each axis' size; at most one may be -1, "all that are left"; one left out is 1.
    Raises `CalmError` for an unknown axis, or sizes that do not use the devices exactly.
    """
    devices = jax.devices() if devices is None else devices
    for axis, size in shape.items():
        if axis not in MESH_AXES:
            raise CalmError(f"mesh.{axis} is not a mesh axis; known are {MESH_AXES}")
        if size < 1 and size != -1:
            raise CalmError(f"mesh.{axis} is {size}; it must be at least 1, or -1 for the rest")
    sizes = [shape.get(axis, 1) for axis in MESH_AXES]
    if sizes.count(-1) > 1:
        raise CalmError(f"mesh {dict(shape)} leaves more than one axis open with -1")
    fixed = math.prod(size for size in sizes if size != -1)
    if fixed > len(devices):
        raise CalmError(f"mesh {dict(shape)} needs {fixed} devices, but there are {len(devices)}")
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise CalmError(f"mesh {dict(shape)} does not use all {len(devices)} devices exactly")
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    return jax.make_mesh(
        sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Mesh axes for logical `axes`. Raises `CalmError` without a rule, or on one used twice."""
    entries, used = [], []
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise CalmError(
                f"no sharding rule for the logical axis {axis!r}; known are {sorted(RULES)}"
            )
        entry = None if axis is None else RULES[axis]
        entries.append(entry)
        used += [entry] if isinstance(entry, str) else list(entry or ())
    for name in used:
        if used.count(name) > 1:
            raise CalmError(f"logical axes {axes} use the mesh axis {name!r} twice")
    return PartitionSpec(*entries)


def array_sharding(
    name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh
) -> NamedSharding:
    """The sharding of the array `name`; dimensions before `axes` are stacked layers.

    Raises `CalmError` naming the array, its dimension and the mesh axes when they do not divide.
    """
    axes = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
    entries = list(partition_spec(axes))
    for dimension, (axis, entry) in enumerate(zip(axes, entries, strict=True)):
        mesh_axes = (entry,) if isinstance(entry, str) else entry or ()
        ways = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if shape[dimension] % ways:
            if axis not in REPLICATED_WHEN_INDIVISIBLE:
                raise CalmError(
                    f"{name}: {axis} of size {shape[dimension]} is not divisible by the mesh's "
                    f"{' x '.join(mesh_axes)} = {ways}"
                )
            entries[dimension] = None
    return NamedSharding(mesh, PartitionSpec(*entries))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batch arrays [B, T]."""
    return NamedSharding(mesh, partition_spec(("batch", "length")))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises `CalmError` unless every device gets the same number of rows of each micro-batch."""
    ways = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if batch_size % (ways * accumulate):
        raise CalmError(
            f"train.batch_size {batch_size} is not divisible by {ways * accumulate} "
            f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} x accumulate {accumulate})"
        )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Fixes the sharding of an activation by its logical axes, where a mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Builds global arrays on the mesh from the rows that this process holds."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }


def init_in_place(make: Callable[[], Any], shardings: Any) -> Any:
    """Runs `make`, a function of no arguments, so that each result is born with its sharding."""
    return jax.jit(make, out_shardings=shardings)()
