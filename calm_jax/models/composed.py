"""The composed model: a frozen anchor that reads frozen augments through a trainable bridge.

CALM, arXiv 2401.02412. The augments run first, without gradients, each up to its last tapped layer;
their language model heads are never computed.

Axes: B batch, T query, S key, D anchor width, N heads, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax import sharding
from calm_jax.errors import CalmError
from calm_jax.models.bridge import Bridge, add_bridges, initialiser, with_taps
from calm_jax.models.cache import DecoderCache, filled
from calm_jax.models.calling import call
from calm_jax.models.composed_cache import ComposedCache
from calm_jax.models.config import CompositionConfig
from calm_jax.models.connections import Connection, plan_connections
from calm_jax.models.cross_attention import BridgePass
from calm_jax.models.cross_cache import empty_cross_cache
from calm_jax.models.decoder import Decoder
from calm_jax.models.execution import Execution, gradients_at_once
from calm_jax.models.inputs import Inputs
from calm_jax.models.layer import ForwardPass
from calm_jax.models.matching import check_devices, differ
from calm_jax.models.own_cache import cached
from calm_jax.models.own_inputs import as_keys, own_inputs
from calm_jax.models.stack import run_layers
from calm_jax.models.taps import Augment, Perturb, TapNumbers, Taps, item_shape


def compose(
    anchor: Decoder,
    augment_or_list: Augment | Sequence[Augment],
    config_or_list: CompositionConfig | Sequence[CompositionConfig] | None = None,
    *,
    rngs: nnx.Rngs,
) -> "ComposedDecoder":
    """Joins an anchor and one or more augments with a new bridge.

    The composed model holds the given models: their weights are neither copied nor changed.

    Args:
        anchor: m_B, the model that generates.
        augment_or_list: m_A, or several; the anchor itself may be among them.
        config_or_list: one `CompositionConfig` per augment, or one for all; default:
            `CompositionConfig()`.
        rngs: draws the bridge's initial values.

    Raises:
        CalmError: a connection outside a model's layers, heads that do not divide the width, or
            models on different devices.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import calm_jax
    >>> def model(width, seed):
    ...     return calm_jax.Decoder(calm_jax.DecoderConfig.palm(
    ...         vocab_size=32, embed_dim=width, num_layers=4, num_heads=2, head_dim=8, mlp_dim=32),
    ...         nnx.Rngs(seed))
    >>> config = calm_jax.CompositionConfig(every=2)
    >>> composed = calm_jax.compose(model(32, 0), model(16, 1), config, rngs=nnx.Rngs(2))
    >>> [(c.layer, c.anchor_layer) for c in composed.connections]
    [(1, 1), (3, 3)]
    >>> composed(jnp.ones((1, 5), jnp.int32)).shape
    (1, 5, 32)
    """
    several = isinstance(augment_or_list, Sequence)
    models = [anchor]
    for augment in augment_or_list if several else [augment_or_list]:
        # A model in two roles becomes two modules that share arrays: each role needs a subtree.
        alone = all(augment is not model for model in models)
        models.append(augment if alone else nnx.merge(*nnx.split(augment)))
    augments = models[1:]
    config = CompositionConfig() if config_or_list is None else config_or_list
    configs = [config] * len(augments) if isinstance(config, CompositionConfig) else list(config)
    return ComposedDecoder(anchor, augments, configs, rngs)


class ComposedDecoder(nnx.Module):
    """One language model made of several; built by `compose` or `calm_jax.load_composed`.

    Attributes:
        anchor: the anchor.
        augments: the augments, in order.
        bridge: the bridge's parameters.
        configs: one `CompositionConfig` per augment.
        plan: the connections, numbered as in metrics, and the rounds that run them.
        own_tokens: for each augment, whether it cannot read the anchor's tokens: its vocabulary
            is another, or it reads features. It then reads inputs of its own, `Inputs.augments`.
        execution: how the bridges are computed; each model has its own `execution`.
    """

    def __init__(
        self,
        anchor: Decoder,
        augments: Sequence[Augment],
        configs: Sequence[CompositionConfig],
        rngs: nnx.Rngs,
    ):
        if not augments:
            raise CalmError("compose needs at least one augment")
        self.configs = tuple(configs)
        self.plan = plan_connections(configs, anchor.depth, [augment.depth for augment in augments])
        self.own_tokens = tuple(
            item_shape(augment) is not None
            or differ(anchor.vocabulary, getattr(augment, "vocabulary", None))
            for augment in augments
        )
        for number, augment in enumerate(augments):
            check_devices(anchor, augment, f"augment {number}")
        self.execution = Execution()
        self.anchor = anchor
        self.augments = nnx.List(augments)
        self.bridge = self._init_bridge(rngs)

    @property
    def connections(self) -> tuple[Connection, ...]:
        return self.plan.connections

    @property
    def models(self) -> list[Any]:
        """The anchor and the augments."""
        return [self.anchor, *self.augments]

    @property
    def part_paths(self) -> dict[str, tuple[str, ...]]:
        """The path of each named part in the model's tree."""
        augments = {f"augment {k}": ("augments", str(k)) for k in range(len(self.augments))}
        return {"anchor": ("anchor",), **augments, "bridge": ("bridge",)}

    @property
    def vocabulary(self):
        return self.anchor.vocabulary

    @property
    def config(self):
        """The anchor's `DecoderConfig`, which also describes the composed inputs and outputs."""
        return self.anchor.config

    def __call__(self, inputs: Inputs | jax.Array) -> jax.Array:
        """Logits of the next token at every position.

        Args:
            inputs: `Inputs`, or tokens, int32 [B, T], for the anchor and every augment with its
                vocabulary.

        Returns:
            float32 [B, T, V] with the anchor's V.

        Raises:
            CalmError: `encoder_only` is set and the inputs have no prompt mask, or an augment with
                a vocabulary of its own, or that reads features, has no inputs of its own.
        """
        return call(self, "forward", inputs)

    def attention_maps(self, inputs: Inputs | jax.Array) -> list[dict[str, Any]]:
        """The attention weights of f_cross: a dict for each connection.

        "augment", "from" (its layer) and "to" (the anchor's) name the connection; "weights" is
        float32 [B, N, T, S].
        """
        weights = call(self, "attention_weights", inputs)
        return [
            {"augment": c.augment, "from": c.layer, "to": c.anchor_layer, "weights": w_BNTS}
            for c, w_BNTS in zip(self.connections, weights, strict=True)
        ]

    def forward(self, inputs: Inputs | jax.Array) -> jax.Array:
        """`__call__` for use inside `jax.jit`."""
        return self.logits(self.residual(Inputs.of(inputs))[0])

    def residual(
        self,
        inputs: Inputs,
        cache: ComposedCache | None = None,
        taps: Mapping[int, Taps] | None = None,
    ) -> tuple[jax.Array, ComposedCache | None]:
        """The bridged residual stream of the anchor [B, T, D], and the updated cache.

        `taps` are those of augments, by number, whose caches already hold the inputs. Into a cache
        augments with inputs of their own read them before, by `read_own`.
        """
        x_BTD, cache, _ = self._run(inputs, cache, known_taps=taps)
        return x_BTD, cache

    def read_own(self, number: int, own: Inputs, cache: ComposedCache) -> ComposedCache:
        """The cache after augment `number` has read further inputs of its own.

        Args:
            own: [P, S], after those that the cache holds; `order_BT` are indices in the anchor's
                rows, which are one sequence each. Features of a row come all at once.
        """
        return cached(self, number, own, cache)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The anchor's final norm and head: float32 [B, T, V] for a residual stream [B, T, D]."""
        return self.anchor.logits(x_BTD)

    def attention_weights(self, inputs: Inputs | jax.Array) -> list[jax.Array]:
        """The weights of `attention_maps`, for use inside `jax.jit`."""
        return self._run(
            Inputs.of(inputs), observe=lambda h, y, weights: weights, bridge_attention="xla"
        )[2]

    def perturbed(
        self, inputs: Inputs, perturb: Perturb | None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The residual stream for the loss, with the strength of each connection.

        Args:
            perturb: applied to the taps before the bridge reads them.

        Returns:
            the stream [B, T, D]; and for each connection float32 [2], the squared norms of f_cross'
            result and of the stream it is added to, over all tokens except padding.
        """
        real_BT1 = (inputs.filled().segments_BT != 0)[:, :, None]

        def squared_norms(h_BTD, y_BTD, weights_BNTS):
            pair = [jnp.where(real_BT1, x.astype(jnp.float32), 0) for x in (y_BTD, h_BTD)]
            return jnp.stack([jnp.sum(jnp.square(x)) for x in pair])

        x_BTD, _, norms = self._run(inputs, observe=squared_norms, perturb=perturb)
        return x_BTD, norms

    def run_alone(self, name: str, inputs: Inputs) -> Any:
        """The result of a forward pass of the anchor or augment called `name`."""
        if name == "anchor":
            return self.anchor.forward(inputs)
        number = int(self.part_paths[name][-1])
        own = inputs.of_augment(number)
        read = inputs if own is None else own.replace(order_BT=None)
        return self.augments[number].taps(read, self.plan.tap_layers[number])[0]

    def init_cache(
        self,
        batch: int,
        slots: int,
        dtype: Any = None,
        whole: Sequence[int] = (),
        own: Mapping[int, int] | None = None,
    ) -> ComposedCache:
        """An empty cache for `batch` rows of up to `slots` tokens.

        Args:
            dtype: that of keys and values; default: that of each model's config.
            whole: numbers of augments that run all their layers, not only those up to a tap.
            own: for augments with inputs of their own, by number, how many of these a row has at
                most; default: `slots`.
        """
        array, described = self.anchor.embedding.get_value(), (self.plan, self.configs, self.config)
        own_slots = tuple(
            (own or {}).get(number, slots) if needed else None
            for number, needed in enumerate(self.own_tokens)
        )

        def of_augment(number: int) -> Any:
            augment, layers = self.augments[number], self.plan.tap_layers[number][-1] + 1
            if item_shape(augment) is not None:
                return None
            layers = augment.depth if number in whole else layers
            return augment.init_cache(batch, own_slots[number] or slots, layers, dtype)

        sizes = (self._widths, batch, slots, own_slots, dtype or self.config.dtype)
        return ComposedCache(
            self.anchor.init_cache(batch, slots, dtype=dtype),
            tuple(map(of_augment, range(len(self.augments)))),
            *empty_cross_cache(array, *described, *sizes),
            tuple(tuple(entry[0].augment for entry in x.entries) for x in self.plan.rounds),
        )

    @property
    def _widths(self) -> tuple[int, ...]:
        return tuple(augment.width for augment in self.augments)

    def _init_bridge(self, rngs: nnx.Rngs) -> Bridge:
        """A new bridge, sharded on the anchor's mesh: it may be too large for one device."""
        mesh = sharding.mesh_holding(self.anchor.embedding.get_value())
        structure, init = initialiser(self.plan, self.configs, self.config, self._widths, mesh)
        return structure.merge(init(rngs.params()))

    def _run(
        self,
        inputs: Inputs,
        cache: ComposedCache | None = None,
        *,
        observe: Callable[..., Any] = lambda h, y, weights: None,
        perturb: Perturb | None = None,
        bridge_attention: str | None = None,
        known_taps: Mapping[int, Taps] | None = None,
    ) -> tuple[jax.Array, ComposedCache | None, list[Any]]:
        """The bridged residual stream, the updated cache, and an observation of each connection.

        An observation is the result of `observe(h, f_cross result, attention weights)`.
        """
        own = own_inputs(inputs, self.augments, self.own_tokens, cached=cache is not None)
        before = None if cache is None else cache.slots
        inputs, slots = filled(inputs.replace(augments=()), before)
        own_slots = (None,) * len(self.augments) if cache is None else cache.own
        taps, augment_caches = [], []
        # A cache orders its tokens itself.
        given = inputs if cache is None else inputs.replace(order_BT=None)
        for number, (augment, tap_layers) in enumerate(
            zip(self.augments, self.plan.tap_layers, strict=True)
        ):
            before = None if cache is None else cache.augments[number]
            if own_slots[number] is not None:
                tap, after = TapNumbers(tap_layers), before
            elif known_taps and number in known_taps:
                tap, after = known_taps[number], before
            else:
                read = given if own[number] is None else own[number].replace(order_BT=None)
                tap, after = augment.taps(read, tap_layers, before)
            taps.append(tap if perturb is None else tap.perturbed(perturb, number))
            augment_caches.append(after)

        execution = self.execution
        if bridge_attention is not None:
            execution = dataclasses.replace(execution, attention=bridge_attention)
        passes = []
        for number, config in enumerate(self.configs):
            latents = None if cache is None else cache.latents[number]
            tap_layers, held = self.plan.tap_layers[number], own_slots[number]
            if latents is not None and held is None:
                latents = with_taps(latents, taps[number], tap_layers, config, slots, inputs)
                taps[number] = TapNumbers(tap_layers)
            keys = own[number] and as_keys(own[number], inputs, config)
            kept = (slots, latents) if held is None else (held, latents, True)
            passes.append(BridgePass(config, self.config, execution, inputs, keys, *kept))
        forward = ForwardPass(self.config, self.anchor.execution, inputs, slots)
        layers, layer_cache = self.anchor.layers, None if cache is None else cache.anchor.layers
        bridge_caches = ((),) * len(self.plan.rounds) if cache is None else cache.bridge
        observed, next_bridge_caches = {}, []

        x_BTD = self.anchor.embed(inputs)
        first = self.connections[0].anchor_layer + 1
        h_BTD, layer_cache = run_layers(layers, x_BTD, forward, layer_cache, count=first)
        for round_, cross_attentions, entry_caches in zip(
            self.plan.rounds, self.bridge.rounds, bridge_caches, strict=True
        ):
            graphdef, state = nnx.split(cross_attentions)
            bridge = execution.rematerialised(
                functools.partial(add_bridges, round_.entries, passes, observe, graphdef),
                in_loop=round_.stacked,
            )
            follow = functools.partial(run_layers, layers, forward=forward, count=round_.layers)
            entry_taps = [
                taps[entry[0].augment].of(tuple(c.layer for c in entry), round_.stacked)
                for entry in round_.entries
            ]
            # Before the first round the stream of a frozen anchor has no gradient.
            at_once = round_.stacked or round_ is not self.plan.rounds[0]

            def step(carry, inputs, bridge=bridge, follow=follow, at_once=at_once):
                h_BTD, layer_cache, entry_caches = carry
                state, entry_taps, number, first = inputs
                if at_once:
                    h_BTD, state = gradients_at_once((h_BTD, state))
                h_BTD, seen, entry_caches = bridge(h_BTD, state, entry_taps, entry_caches, number)
                h_BTD, layer_cache = follow(h_BTD, cache=layer_cache, first=first)
                return (h_BTD, layer_cache, entry_caches), seen

            carry = (h_BTD, layer_cache, entry_caches)
            if round_.stacked:
                numbers = jnp.arange(len(round_.entries[0]))
                firsts = round_.first + round_.layers * numbers
                of_steps = (state, entry_taps, numbers, firsts)
                carry, seen = jax.lax.scan(step, carry, of_steps, unroll=execution.unroll)
            else:
                carry, seen = step(carry, (state, entry_taps, 0, round_.first))
                seen = jax.tree.map(lambda x: x[None], seen)
            h_BTD, layer_cache, entry_caches = carry
            next_bridge_caches.append(entry_caches)
            for entry, values in zip(round_.entries, seen, strict=True):
                if values is not None:
                    observed.update(zip(entry, values, strict=True))
        if cache is not None:
            cache = dataclasses.replace(
                cache,
                anchor=DecoderCache(layer_cache, slots),
                augments=tuple(augment_caches),
                bridge=tuple(next_bridge_caches),
                latents=tuple(forward.latents for forward in passes),
            )
        return h_BTD, cache, [observed.get(connection) for connection in self.connections]
