"""How arrays are sharded: one mesh, and one table from logical axes to mesh axes.

This is the only file that names mesh axes. Models give *logical* axes to their parameters and
activations; `RULES` maps each to the mesh axes that split it.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from calm_jax.errors import CalmError

# Outermost first: the data-centre network connects slices; faster links connect their devices.
MESH_AXES = ("slices", "data", "fsdp", "tensor")

Rules = Mapping[str, tuple[str, ...]]

# Parameters are split over `fsdp` along the model width, and over `tensor` along heads, MLP
# features and vocabulary. Activations are split over all axes but `tensor` along the batch, and the
# residual stream also over `tensor` along its length.
RULES: Rules = {
    "batch": ("slices", "data", "fsdp"),
    "length": (),
    "cache_length": (),
    "stream_length": ("tensor",),
    "activation_embed": (),
    "embed": ("fsdp",),
    "augment_embed": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "lora_rank": (),
    # Groups of weights along an axis, which share a scale, are split as the axis.
    "embed_groups": ("fsdp",),
    "head_dim_groups": (),
    "mlp_groups": ("tensor",),
}

# Rules of weights by the config's `weight_sharding`: "all" splits them over all devices of a slice.
# Each layer is gathered when it runs.
_ALL = ("data", "fsdp")
WEIGHT_RULES: dict[str, Rules] = {
    "fsdp": RULES,
    "all": {**RULES, "embed": _ALL, "embed_groups": _ALL},
}

# Logical axes of weights that are not split if the mesh does not divide them: there may be fewer
# key heads than devices along `tensor`, an augment may have any width, and a device's share of a
# weight may end within a group.
REPLICATED_WHEN_INDIVISIBLE = frozenset({"kv_heads", "augment_embed", "embed_groups", "mlp_groups"})


def make_mesh(shape: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all), with axes `slices`, `data`, `fsdp`, `tensor`.

    `shape` gives the size of each axis, by default 1. At most one may be -1, which takes the
    remaining devices. If `slices` is missing or 0, it is the number of slices that the devices
    form; CPU devices form none and may simulate any number.

    Raises `CalmError` for an unknown axis, sizes that do not use all devices, or a wrong number of
    slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", None) for device in devices})
    without_slices = slices == 1 and devices[0].platform == "cpu"
    sizes = list(mesh_sizes(shape, len(devices), None if without_slices else slices).values())
    types = (AxisType.Auto,) * len(MESH_AXES)
    if slices == 1:
        # A mesh axis may cover part of a physical axis: 8 x 8 x 8 chips as 2 x 32 x 8.
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(array, MESH_AXES, axis_types=types)
    array = mesh_utils.create_hybrid_device_mesh(
        [1, *sizes[1:]], [slices, 1, 1, 1], devices, allow_split_physical_axes=True
    )
    return Mesh(array, MESH_AXES, axis_types=types)


def mesh_sizes(shape: Mapping[str, int], devices: int, slices: int | None) -> dict[str, int]:
    """The size of every axis for a `shape` as in `make_mesh`; raises the same errors.

    `slices` is the number of slices that the devices form; None if they form none.
    """
    shape = {**shape, "slices": shape.get("slices", 0) or slices or 1}
    for axis, size in shape.items():
        if axis not in MESH_AXES:
            raise CalmError(f"mesh.{axis} is not a mesh axis; known are {MESH_AXES}")
        if size < 1 and size != -1:
            raise CalmError(f"mesh.{axis} is {size}; it must be at least 1, or -1 for the rest")
    sizes = [shape.get(axis, 1) for axis in MESH_AXES]
    mesh = f"mesh {shown(dict(zip(MESH_AXES, sizes, strict=True)))}"
    if sizes.count(-1) > 1:
        raise CalmError(f"{mesh} has -1 for more than one axis")
    fixed = math.prod(size for size in sizes if size != -1)
    if fixed > devices:
        found = f"there {'is' if devices == 1 else 'are'} {devices}"
        raise CalmError(f"{mesh} needs {fixed} devices, but {found}")
    if -1 not in sizes and fixed != devices:
        raise CalmError(f"{mesh} uses {fixed} of the {devices} devices; all must be used")
    if devices % fixed:
        raise CalmError(f"{mesh}: the {devices} devices are not divisible by {fixed}")
    sizes = [devices // fixed if size == -1 else size for size in sizes]
    if slices not in (None, sizes[0]):
        raise CalmError(f"mesh.slices is {sizes[0]}, but the devices form {slices}")
    return dict(zip(MESH_AXES, sizes, strict=True))


def shown(sizes: Mapping[str, int]) -> str:
    """The sizes of a mesh for messages.

    >>> shown({"slices": 1, "data": 2, "fsdp": -1, "tensor": 4})
    'slices 1 × data 2 × fsdp -1 × tensor 4'
    """
    return " × ".join(f"{axis} {size}" for axis, size in sizes.items())


def _mesh_axes(axes: Sequence[str | None], rules: Rules) -> list[tuple[str, ...]]:
    """The mesh axes of each logical axis; raises `CalmError` without a rule or on a double use."""
    for axis in axes:
        if axis is not None and axis not in rules:
            raise CalmError(
                f"no sharding rule for the logical axis {axis!r}; known are {sorted(rules)}"
            )
    entries = [() if axis is None else rules[axis] for axis in axes]
    used = list(itertools.chain(*entries))
    for name in used:
        if used.count(name) > 1:
            raise CalmError(f"logical axes {tuple(axes)} use the mesh axis {name!r} twice")
    return entries


def array_sharding(
    name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, rules: Rules = RULES
) -> NamedSharding:
    """The sharding of the array `name`; axes in front of `axes` are those of stacked layers.

    Raises `CalmError` naming the array, the axis and the mesh axes if these do not divide it.
    """
    axes = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
    return NamedSharding(automatic(mesh), _fitting_spec(name, shape, axes, mesh, rules))


def automatic(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """The same mesh with axes of type Auto: `jax.make_mesh` makes axes of type Explicit."""
    return mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _fitting_spec(name: str | None, shape, axes, mesh, rules: Rules = RULES) -> PartitionSpec:
    return PartitionSpec(
        *(entry or None for entry in _fitting_axes(name, shape, axes, mesh, rules))
    )


def _fitting_axes(name: str | None, shape, axes, mesh, rules: Rules) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of an array.

    An axis that they do not divide is not split; if the array has a name, it is an error.
    """
    entries = []
    for axis, size, mesh_axes in zip(axes, shape, _mesh_axes(axes, rules), strict=True):
        # A mesh made elsewhere may have fewer axes.
        mesh_axes = tuple(mesh_axis for mesh_axis in mesh_axes if mesh_axis in mesh.shape)
        ways = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if size % ways and name is not None and axis not in REPLICATED_WHEN_INDIVISIBLE:
            raise CalmError(
                f"{name}: {axis} of size {size} is not divisible by the mesh's "
                f"{' x '.join(mesh_axes)} = {ways}"
            )
        entries.append(mesh_axes if size % ways == 0 else ())
    return entries


def ways(axis: str | None, size: int, mesh: Mesh | AbstractMesh) -> int:
    """Number of parts that an activation's axis is split into; 1 if the mesh does not divide it.

    >>> mesh = AbstractMesh((2, 4), ("data", "tensor"))
    >>> ways("kv_heads", 8, mesh), ways("kv_heads", 2, mesh)
    (4, 1)
    """
    (mesh_axes,) = _fitting_axes(None, (size,), (axis,), mesh, RULES)
    return math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batch arrays [B, T]."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], None))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises `CalmError` if devices would get different numbers of rows of a micro-batch."""
    ways = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if batch_size % (ways * accumulate):
        sizes = shown({axis: mesh.shape[axis] for axis in RULES["batch"]})
        raise CalmError(
            f"train.batch_size {batch_size} is not divisible by {ways * accumulate} "
            f"({sizes} × accumulate {accumulate})"
        )


def current_mesh(*arrays: jax.Array) -> jax.sharding.AbstractMesh:
    """The mesh set by `jax.set_mesh`, or else the first mesh that one of `arrays` is on.

    So a model on a mesh runs there even if the caller sets no mesh.
    """
    meshes = [jax.sharding.get_abstract_mesh()]
    for x in arrays:
        meshes.append(getattr(jax.typeof(x).sharding, "mesh", meshes[0]))
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def mesh_holding(array: jax.Array) -> Mesh | None:
    """The mesh that an array is on; None if it is on a single device, or has no values."""
    held = None if isinstance(array, jax.core.Tracer) else getattr(array, "sharding", None)
    return held.mesh if isinstance(held, NamedSharding) else None


def mesh_of(array: jax.Array):
    """A context that sets the mesh of `array`, unless a mesh is already set."""
    return jax.sharding.use_abstract_mesh(current_mesh(array))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation by its logical axes, if there is a mesh."""
    mesh = current_mesh(x)
    if mesh.empty:
        return x
    spec = _fitting_spec(None, x.shape, axes, mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def on_each_device(
    function: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    axes: Sequence[Sequence[str | None]],
) -> jax.Array:
    """`function(*arrays)`; on a mesh each device calls it on its own shards.

    `axes` are the logical axes of each array. The result is sharded as the first array.
    """
    mesh = current_mesh(*arrays)
    if mesh.empty:
        return function(*arrays)
    specs = tuple(
        _fitting_spec(None, x.shape, x_axes, mesh) for x, x_axes in zip(arrays, axes, strict=True)
    )
    split = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return split(*arrays)


def look_up(
    table_VD: jax.Array, ids_BT: jax.Array, weight_sharding: str, dtype: jnp.dtype
) -> jax.Array:
    """The rows `ids_BT` of a table that is split by `WEIGHT_RULES[weight_sharding]`.

    Each device looks up its part of the width for the ids of all devices that share the table's
    width with it, and sends the results back to them. The table is never gathered.

    Args:
        table_VD: float or integers [V, D].
        ids_BT: int32 [B, T].

    Returns:
        [B, T, D] in `dtype`, split along its length as the residual stream.
    """
    mesh = current_mesh(table_VD)
    if mesh.empty:
        return table_VD[ids_BT].astype(dtype)
    rules = WEIGHT_RULES[weight_sharding]
    vocab, embed = _fitting_axes(None, table_VD.shape, ("vocab", "embed"), mesh, rules)
    batch, length = _fitting_axes(None, ids_BT.shape, ("batch", "stream_length"), mesh, RULES)
    # Devices that split the table's width hold different rows of ids, if the batch is split at all.
    exchanged = embed if batch else ()

    def on_device(table_VD, ids_BT):
        if exchanged:
            ids_BT = jax.lax.all_gather(ids_BT, exchanged, tiled=True)
        first = jax.lax.axis_index(vocab) * len(table_VD) if vocab else 0
        here_BT1 = ((ids_BT >= first) & (ids_BT < first + len(table_VD)))[:, :, None]
        x_BTD = jnp.where(here_BT1, table_VD[ids_BT - first].astype(dtype), 0)
        if vocab and length:
            x_BTD = jax.lax.psum_scatter(x_BTD, vocab, scatter_dimension=1, tiled=True)
        elif vocab:
            x_BTD = jax.lax.psum(x_BTD, vocab)
        if exchanged:
            x_BTD = jax.lax.all_to_all(x_BTD, exchanged, split_axis=0, concat_axis=2, tiled=True)
        return x_BTD

    split = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(vocab or None, embed or None), PartitionSpec(batch or None, None)),
        out_specs=PartitionSpec(
            batch or None, (vocab and length) or None, None if exchanged else embed or None
        ),
        check_vma=False,
    )
    return split(table_VD, ids_BT)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(k, n): this process holds the k-th of n equal shares of each batch's rows.

    Raises `CalmError` if the shares of processes overlap only in part.
    """
    axes = [mesh.axis_names.index(axis) for axis in RULES["batch"]]
    ways = math.prod(mesh.devices.shape[axis] for axis in axes)
    rows = np.moveaxis(mesh.devices, axes, range(len(axes))).reshape(ways, -1)
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, shares)) != ways or len(set(map(len, shares))) > 1:
        raise CalmError(
            f"mesh {shown(mesh.shape)} splits the batch {ways} ways, which does not fit "
            f"{len(held)} processes; mesh.tensor must divide the devices of a process, or be a "
            "multiple of them"
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def on_host(x: jax.Array) -> np.ndarray:
    """The full array. If several processes hold it, all of them must call this."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def put_replicated(value: np.ndarray | np.generic, mesh: Mesh) -> jax.Array:
    """Puts a small value, which is the same in all processes, on every device."""
    return jax.make_array_from_process_local_data(replicated(mesh), np.asarray(value))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays on the mesh, from the rows of this process."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }


def resharded(tree: Any, shardings: Any) -> Any:
    """The same values with other shardings over the same devices."""
    return jax.jit(lambda tree: tree, out_shardings=shardings)(tree)


def init_sharded(make: Callable[[], Any], shardings: Any) -> Any:
    """The tree that `make()` returns, each array created with its sharding."""
    return jax.jit(make, out_shardings=shardings)()
