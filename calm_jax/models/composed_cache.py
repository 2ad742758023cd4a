"""The cache of a composed model: those of its parts, and that of f_cross.

An augment with inputs of its own, other tokens or features, has slots of its own. f_cross' queries
see them by the order that each input came with: the anchor's token from which on it is read.

Axes: B batch, P rows of the inputs, S slot, L layer, K key heads, H head width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax.models.cache import DecoderCache, KeysValues, Slots, Vectors, with_copy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ComposedCache:
    """The cache of a composed model.

    Attributes:
        anchor: the anchor's.
        augments: the cache of each augment, of whatever type the augment uses; None for one that
            reads features, of which only f_cross' cache is kept.
        bridge: keys and values of f_cross, for each round and each entry of its plan; L is the
            number of connections in the entry. None where `latents` replace them.
        latents: for each augment the latents of its taps, one head as wide as the augment; L is the
            number of its tapped layers. None where `bridge` holds keys and values.
        own: for each augment with inputs of its own the slots of f_cross' cache; None for others,
            whose slots are the anchor's.
        entries: the number of the augment of each entry of `bridge`.
    """

    anchor: DecoderCache
    augments: tuple[Any, ...]
    bridge: tuple[tuple[KeysValues | None, ...], ...]
    latents: tuple[Vectors | None, ...]
    own: tuple[Slots | None, ...]
    entries: tuple[tuple[int, ...], ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def slots(self) -> Slots:
        return self.anchor.slots

    def using(
        self,
        rows_P: jax.Array | None = None,
        read: int | None = None,
        own: tuple[int | None, ...] = (),
    ) -> "ComposedCache":
        """As `DecoderCache.using`; `own` is what is read of each augment's own slots."""
        cache = self._mapped(lambda cache: cache.using(rows_P, read))
        reads = own or (None,) * len(self.own)
        slots = tuple(
            None if x is None else x.using(rows_P, of_augment)
            for x, of_augment in zip(self.own, reads, strict=True)
        )
        return dataclasses.replace(cache, own=slots)

    def with_length(self, length_B: jax.Array) -> "ComposedCache":
        """As `DecoderCache.with_length`; own slots keep their lengths."""
        return self._mapped(lambda cache: cache.with_length(length_B))

    def with_copy(
        self, source: jax.Array, target: jax.Array, count: int, own: tuple[int | None, ...] = ()
    ) -> "ComposedCache":
        """As `DecoderCache.with_copy`; `own` is the number of each augment's own slots."""
        counts = [of_augment or count for of_augment in own or (None,) * len(self.augments)]
        cache = dataclasses.replace(self, anchor=self.anchor.with_copy(source, target, count))
        for number, of_augment in enumerate(counts):
            copied = functools.partial(with_copy, source=source, target=target, count=of_augment)
            cache = cache._with(number, copied)
        return cache

    def own_using(
        self, number: int, rows_P: jax.Array | None = None, read: int | None = None
    ) -> "ComposedCache":
        """As `using`, for the next inputs of its own of augment `number`."""
        return self._with_slots(number, lambda slots: slots.using(rows_P, read))

    def own_kept(self, row: jax.Array, kept: tuple[jax.Array | None, ...]) -> "ComposedCache":
        """A copy whose row `row` keeps its first inputs of its own: `kept` of each augment."""

        def keep(slots, count):
            return slots.with_length(slots.length_B.at[row].set(count))

        cache = self
        for number, count in enumerate(kept):
            if count is not None:
                cache = cache._with_slots(number, functools.partial(keep, count=count))
        return cache

    def own_grown(self, number: int, slots: int) -> "ComposedCache":
        """A copy with `slots` slots for the inputs of its own of augment `number`."""
        return self._with(number, functools.partial(_grown, slots=slots))

    def _with_slots(self, number: int, function: Callable[[Slots], Slots]) -> "ComposedCache":
        """A copy with `function` of the slots of augment `number`, in its cache and in f_cross'."""

        def of_part(part):
            if isinstance(part, DecoderCache):
                return dataclasses.replace(part, slots=function(part.slots))
            return function(part) if isinstance(part, Slots) else part

        return self._with(number, of_part)

    def _mapped(self, function: Callable[[Any], Any]) -> "ComposedCache":
        """A copy with `function` of each cache whose slots are those of the anchor."""
        augments = tuple(
            function(cache) if own is None else cache
            for cache, own in zip(self.augments, self.own, strict=True)
        )
        return dataclasses.replace(self, anchor=function(self.anchor), augments=augments)

    def _with(self, number: int, function: Callable[[Any], Any]) -> "ComposedCache":
        """A copy with `function` of each part that belongs to augment `number`."""

        def of_augment(parts, numbers):
            return tuple(
                function(part) if number == of_part and part is not None else part
                for part, of_part in zip(parts, numbers, strict=True)
            )

        numbers = range(len(self.augments))
        return dataclasses.replace(
            self,
            augments=of_augment(self.augments, numbers),
            latents=of_augment(self.latents, numbers),
            own=of_augment(self.own, numbers),
            bridge=tuple(map(of_augment, self.bridge, self.entries)),
        )


@functools.partial(jax.jit, static_argnames="slots")
def _grown(tree: Any, slots: int) -> Any:
    """Any tree of caches with more slots, which are empty."""

    def grown(x):
        axis = {1: None, 2: 1, 5: 3}[x.ndim]  # [B], [B, S] and [L, B, K, S, H]
        if axis is None:
            return x
        return jnp.pad(x, [(0, slots - size if k == axis else 0) for k, size in enumerate(x.shape)])

    return jax.tree.map(grown, tree)
