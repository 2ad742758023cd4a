"""Runs layers: a module whose weights are stacked arrays [L, ...] for L layers, or a list.

Running all stacked layers is a scan over the weights. Running some is a scan over their numbers,
which slices one layer at a time out of the stack: no larger part is ever copied. Layers in a list,
as `calm_jax.decoding.prepared` makes them, run one after another.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm_jax.models.cache import KeysValues, LayerCaches
from calm_jax.models.layer import ForwardPass


def run_layers(
    layers: nnx.Module,
    x_BTD: jax.Array,
    forward: ForwardPass,
    cache: LayerCaches | None = None,
    *,
    first: jax.Array | int = 0,
    count: int | None = None,
) -> tuple[jax.Array, LayerCaches | None]:
    """Runs `count` layers from number `first`, which may be traced; default: all layers.

    Args:
        layers: a `Layer` whose arrays have a leading axis of layers, or an `nnx.List` of layers.
        x_BTD: the residual stream [B, T, D].
        cache: covers at least the layers that run.

    Returns:
        the output of the last layer [B, T, D], and the updated cache.
    """
    if count == 0:
        return x_BTD, cache
    if not are_stacked(layers):
        return _one_by_one(layers, x_BTD, forward, cache, first, count)
    graphdef, stacked = nnx.split(layers)
    local_L = np.array(forward.config.local_layers)
    depth = len(local_L)
    numbers = jnp.arange(depth if count is None else count) + first
    if count is not None and count != depth:

        def weights_of(number):
            return (
                jax.tree.map(
                    lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), stacked
                ),
                jnp.asarray(local_L)[number],
                number,
            )

        return _scan(graphdef, weights_of, x_BTD, cache, numbers, forward)
    inputs = (stacked, jnp.asarray(local_L), None if cache is None else numbers)
    return _scan(graphdef, lambda weights: weights, x_BTD, cache, inputs, forward)


def are_stacked(layers: nnx.Module) -> bool:
    """Whether layers are one module of stacked arrays, not a list."""
    return not isinstance(layers, nnx.List)


def run_groups(
    layers: nnx.Module,
    x_BTD: jax.Array,
    forward: ForwardPass,
    cache: KeysValues | None,
    *,
    groups: int,
    size: int,
) -> tuple[jax.Array, KeysValues | None, jax.Array]:
    """Runs the first `groups` groups of `size` layers, in one loop.

    Returns:
        as `run_layers`, and the output of each group, [groups, B, T, D].
    """

    def group(carry, first):
        x_BTD, cache = run_layers(layers, *carry[:1], forward, carry[1], first=first, count=size)
        return (x_BTD, cache), x_BTD

    (x_BTD, cache), outputs = jax.lax.scan(
        group, (x_BTD, cache), size * jnp.arange(groups), unroll=forward.execution.unroll
    )
    return x_BTD, cache, outputs


def _one_by_one(
    layers: nnx.List,
    x_BTD: jax.Array,
    forward: ForwardPass,
    caches: tuple[KeysValues, ...] | None,
    first: int,
    count: int | None,
) -> tuple[jax.Array, tuple[KeysValues, ...] | None]:
    """As `run_layers`, for a list of layers; each has a cache of its own."""
    after = [None] * len(layers) if caches is None else list(caches)
    for number in range(first, len(layers) if count is None else first + count):
        local = forward.config.local_layers[number]
        x_BTD, after[number] = layers[number](x_BTD, after[number], forward, local, 0)
    return x_BTD, None if caches is None else tuple(after)


def _scan(
    graphdef: nnx.GraphDef,
    weights_of: Callable[[Any], Any],
    x_BTD: jax.Array,
    cache: KeysValues | None,
    inputs: Any,
    forward: ForwardPass,
) -> tuple[jax.Array, KeysValues | None]:
    """Scans over `inputs`; `weights_of` gives (weights, whether local, number) of each input."""

    def layer(x_BTD, cache, layer_input):
        weights, local, number = weights_of(layer_input)
        return nnx.merge(graphdef, weights)(x_BTD, cache, forward, local, number)

    layer = forward.execution.rematerialised(layer, in_loop=True)

    def step(carry, layer_input):
        return layer(*carry, layer_input), None

    return jax.lax.scan(step, (x_BTD, cache), inputs, unroll=forward.execution.unroll)[0]
