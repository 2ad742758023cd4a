"""The bridge: the cross-attention of every connection, a composed model's only new parameters.

Axes: B batch, T query, D anchor width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax.models.cache import KeysValues, Slots, Vectors
from calm_jax.models.config import CompositionConfig, DecoderConfig
from calm_jax.models.connections import Connection, ConnectionPlan, Round
from calm_jax.models.cross_attention import BridgePass, CrossAttention, KeyPass, latent
from calm_jax.models.inputs import Inputs
from calm_jax.models.parameters import Structure, Tree, module_tree, stacked
from calm_jax.models.taps import Taps


class Bridge(nnx.Module):
    """The cross-attentions of each round; those of a stacked round are stacked arrays.

    A connection's initial values depend only on its number, not on how rounds are stacked.

    Args:
        augment_widths: the width of each augment's hidden states.
    """

    def __init__(
        self,
        plan: ConnectionPlan,
        configs: Sequence[CompositionConfig],
        anchor: DecoderConfig,
        augment_widths: Sequence[int],
        rngs: nnx.Rngs,
    ):
        keys = jax.random.split(rngs.params(), len(plan.connections))
        number = {connection: index for index, connection in enumerate(plan.connections)}

        def cross_attention(round_: Round, entry: tuple[Connection, ...]) -> nnx.Module:
            augment = entry[0].augment
            make = functools.partial(
                CrossAttention, configs[augment], anchor, augment_widths[augment]
            )
            entry_keys = jnp.stack([keys[number[connection]] for connection in entry])
            return stacked(make, entry_keys if round_.stacked else entry_keys[0])

        self.rounds = nnx.List(
            [
                nnx.List([cross_attention(round_, entry) for entry in round_.entries])
                for round_ in plan.rounds
            ]
        )


@functools.cache
def initialiser(
    plan: ConnectionPlan,
    configs: tuple[CompositionConfig, ...],
    anchor: DecoderConfig,
    widths: tuple[int, ...],
    mesh: jax.sharding.Mesh | None,
) -> tuple[Structure, Callable[[jax.Array], Tree]]:
    """A bridge's structure, and its arrays as a function of a key, which compiles once."""
    make = functools.partial(Bridge, plan, configs, anchor, widths)
    structure = Structure(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    shardings = None if mesh is None else structure.shardings(mesh)
    init = jax.jit(lambda key: module_tree(make(nnx.Rngs(params=key))), out_shardings=shardings)
    return structure, init


def with_taps(
    latents: Vectors,
    taps: Taps,
    layers: Sequence[int],
    config: CompositionConfig,
    slots: Slots,
    inputs: Inputs,
) -> Vectors:
    """An augment's `latents`, with those of new `filled` inputs at the tapped `layers` added."""
    slots_PT = slots.slots_of(inputs)
    for number, layer in enumerate(layers):
        latent_PTE = latent(taps.layer(layer), config)
        latents = latents.write(number, slots, slots_PT, latent_PTE[:, :, None])
    return latents


def with_keys_and_values(
    cross_attention: CrossAttention,
    tap: jax.Array,
    cache: KeysValues,
    forward: KeyPass,
    dtype: Any,
    stacked: bool,
) -> KeysValues:
    """The `cache` of an entry of a round, with keys and values of its tap added.

    `tap` is [G, B, S, E] for the G connections of a `stacked` round, else [B, S, E].
    """
    graphdef, state = nnx.split(cross_attention)

    def add(cache, inputs):
        state, tap_BSE, number = inputs
        k_BSNH, v_BSNH = nnx.merge(graphdef, state).keys_and_values(tap_BSE, dtype, forward)
        return cache.write(number, forward.slots, forward.slots_BS, k_BSNH, v_BSNH), None

    if not stacked:
        return add(cache, (state, tap, 0))[0]
    return jax.lax.scan(add, cache, (state, tap, jnp.arange(len(tap))))[0]


def add_bridges(
    entries: Sequence[tuple[Connection, ...]],
    passes: Sequence[BridgePass],
    observe: Callable[..., Any],
    graphdef: nnx.GraphDef,
    h_BTD: jax.Array,
    state: nnx.State,
    taps: Sequence[jax.Array],
    caches: Sequence[KeysValues | None],
    number: jax.Array | int,
) -> tuple[jax.Array, list[Any], tuple[KeysValues | None, ...]]:
    """h + the sum of f_cross over the entries of one round; all read the same h.

    Args:
        passes: what the connections of each augment share.
        observe: called with h, the result of f_cross and its attention weights.
        graphdef, state: the round's cross-attentions; in a stacked round those of one step.
        taps: the tap of each entry; if latents are cached, the index of its layer among them. Not
            used if keys and values are all cached.
        caches: the cache of each entry, None if latents are cached; empty without a cache.
        number: the step of a stacked round, else 0.

    Returns:
        the sum [B, T, D]; what `observe` returned for each entry; and the updated caches.
    """
    sum_BTD, observed, caches = h_BTD, [], list(caches)
    for k, cross_attention in enumerate(nnx.merge(graphdef, state)):
        forward = passes[entries[k][0].augment]
        with jax.named_scope("f_cross"):
            if forward.latents is not None:
                latent_BSE = forward.latents.read(taps[k], forward.slots, h_BTD.dtype)[:, :, 0]
                y_BTD, weights = cross_attention.attend_to_latents(h_BTD, latent_BSE, forward), None
            else:
                if not forward.written:
                    k_BSNH, v_BSNH = cross_attention.keys_and_values(taps[k], h_BTD.dtype, forward)
                    if caches:
                        new = (forward.slots, forward.slots_BS, k_BSNH, v_BSNH)
                        caches[k] = caches[k].write(number, *new)
                if caches:
                    k_BSNH, v_BSNH = caches[k].read(number, forward.slots, h_BTD.dtype)
                y_BTD, weights = cross_attention.attend(h_BTD, k_BSNH, v_BSNH, forward)
        sum_BTD += y_BTD
        observed.append(observe(h_BTD, y_BTD, weights))
    return sum_BTD, observed, tuple(caches)
