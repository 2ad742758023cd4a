"""How an augment with inputs of its own reads them into a cache, before the anchor does.

What it reads follows from the anchor's tokens, and never from the anchor's states: so it may be
read by itself. f_cross' queries see it by its order.

Axes: P rows of the inputs, S augment position.
"""

import dataclasses
from typing import Any

from calm_jax.models.bridge import with_keys_and_values, with_taps
from calm_jax.models.composed_cache import ComposedCache
from calm_jax.models.cross_attention import KeyPass
from calm_jax.models.inputs import Inputs


def cached(model: Any, number: int, own: Inputs, cache: ComposedCache) -> ComposedCache:
    """`ComposedDecoder.read_own` of `model`."""
    config, layers = model.configs[number], model.plan.tap_layers[number]
    order_PS, before = own.order_BT, cache.own[number]
    own = own.replace(order_BT=None).filled(before.length_P)  # in the order in which they arrive
    slots = before.write(own, order_PS)
    given, of_augment = own.replace(order_BT=None), cache.augments[number]
    taps, of_augment = model.augments[number].taps(given, layers, of_augment)

    latents, bridge = cache.latents[number], cache.bridge
    if latents is not None:
        latents = with_taps(latents, taps, layers, config, slots, own)
    else:
        # A rotated key stands where the anchor's token stands from which on it is read.
        keys = KeyPass(config, model.config, own.replace(positions_BT=order_PS), slots)
        bridge = [list(entries) for entries in bridge]
        for of_round, round_, modules in zip(
            bridge, model.plan.rounds, model.bridge.rounds, strict=True
        ):
            for k, entry in enumerate(round_.entries):
                if entry[0].augment == number:
                    tap = taps.of(tuple(c.layer for c in entry), round_.stacked)
                    of_round[k] = with_keys_and_values(
                        modules[k], tap, of_round[k], keys, model.config.dtype, round_.stacked
                    )
        bridge = tuple(map(tuple, bridge))

    def put(parts, part):
        return tuple(part if k == number else old for k, old in enumerate(parts))

    return dataclasses.replace(
        cache,
        augments=put(cache.augments, of_augment),
        latents=put(cache.latents, latents),
        own=put(cache.own, slots),
        bridge=bridge,
    )
