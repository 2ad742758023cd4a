"""The two forms of f_cross' cache, and which of them a model keeps.

Projected: keys and values of each connection. Latent: the normed taps that these are computed from,
shared by all connections that read the same layer (`calm_jax.models.cross_attention`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from calm_jax import sharding
from calm_jax.models.cache import KEY_AXES, LATENT_AXES, KeysValues, Slots, Vectors
from calm_jax.models.calling import make_on_mesh_of
from calm_jax.models.config import CompositionConfig, DecoderConfig, heads
from calm_jax.models.connections import Connection, ConnectionPlan

# A few features of a residual stream may be many times larger than the others: in int8 they reduce
# the precision of their own group only.
LATENT_GROUP = 128

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


class CrossBytes(NamedTuple):
    """Bytes that a token takes on a device in the cache of the connections of one augment.

    `latent` is None where the latent form is not exact.
    """

    projected: int
    latent: int | None

    @property
    def is_latent(self) -> bool:
        """Whether the latent form is kept: it is exact and smaller."""
        return self.latent is not None and self.latent < self.projected

    @property
    def kept(self) -> int:
        """Bytes of the form that is kept."""
        return self.latent if self.is_latent else self.projected


def cross_bytes(
    plan: ConnectionPlan,
    configs: Sequence[CompositionConfig],
    anchor: DecoderConfig,
    widths: Sequence[int],
    dtype: Any,
    mesh: Mesh | None = None,
) -> tuple[CrossBytes, ...]:
    """The bytes of both forms for each augment; `widths` are those of their hidden states.

    Args:
        dtype: that of the cache.
        mesh: splits heads over devices, and latents along their width.
    """
    found = []
    for number, (config, width) in enumerate(zip(configs, widths, strict=True)):
        N, H = heads(config, anchor)
        connections = sum(connection.augment == number for connection in plan.connections)
        projected = connections * 2 * vector_bytes(N, H, dtype, mesh)
        # A rotated key depends on the token's position, so W_K cannot be moved to the query.
        of_tap = vector_bytes(1, width, dtype, mesh, LATENT_AXES, _groups(width))
        latent = len(plan.tap_layers[number]) * of_tap
        found.append(CrossBytes(projected, None if config.rotary else latent))
    return tuple(found)


def vector_bytes(
    heads: int,
    width: int,
    dtype: Any,
    mesh: Mesh | None = None,
    axes: tuple[str | None, ...] = KEY_AXES,
    groups: int = 1,
) -> int:
    """Bytes on one device of a vector of `width` features for each of `heads`.

    int8 has a float32 scale for each of `groups` groups of features.
    """
    if mesh is not None:
        heads //= sharding.ways(axes[2], heads, mesh)
        width //= sharding.ways(axes[4], width, mesh)
        groups //= sharding.ways(axes[4], groups, mesh)
    dtype = jnp.dtype(dtype)
    return heads * (width * dtype.itemsize + (4 * groups if dtype == jnp.int8 else 0))


def empty_cross_cache(
    array: jax.Array,
    plan: ConnectionPlan,
    configs: tuple[CompositionConfig, ...],
    anchor: DecoderConfig,
    widths: tuple[int, ...],
    batch: int,
    slots: int,
    own: tuple[int | None, ...],
    dtype: Any,
) -> tuple[tuple, tuple[Vectors | None, ...], tuple[Slots | None, ...]]:
    """`bridge`, `latents` and `own` of a `ComposedCache`, empty, on the mesh of `array`.

    `own` is the number of slots of each augment with inputs of its own; None for others.
    """
    sizes = cross_bytes(plan, configs, anchor, widths, dtype, sharding.current_mesh(array))
    are_latent = tuple(size.is_latent for size in sizes)
    arguments = (plan, configs, anchor, widths, are_latent, batch, slots, own, dtype)
    return make_on_mesh_of(array, _empty, arguments)


def _empty(plan, configs, anchor, widths, are_latent, batch, slots, own, dtype):
    slots_of = [slots if of_augment is None else of_augment for of_augment in own]

    def projected(entry: tuple[Connection, ...]) -> KeysValues | None:
        augment = entry[0].augment
        if are_latent[augment]:
            return None
        N, H = heads(configs[augment], anchor)
        return KeysValues.empty(len(entry), batch, N, slots_of[augment], H, dtype)

    def latent(augment: int) -> Vectors | None:
        if not are_latent[augment]:
            return None
        layers, width = len(plan.tap_layers[augment]), widths[augment]
        sizes = (layers, batch, 1, slots_of[augment], width)
        return Vectors.empty(*sizes, dtype, LATENT_AXES, _groups(width))

    return (
        tuple(tuple(map(projected, round_.entries)) for round_ in plan.rounds),
        tuple(map(latent, range(len(widths)))),
        tuple(None if x is None else Slots.empty(batch, x, ordered=True) for x in own),
    )


def _groups(width: int) -> int:
    return 1 if width % LATENT_GROUP else width // LATENT_GROUP
