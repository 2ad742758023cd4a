"""The composed model: a frozen anchor that reads frozen augments through a trainable bridge.

CALM, arXiv 2401.02412. The augments run first, forward only, each up to its last tap; their
language model heads are never computed. What a token may see is told in
`calm_jax.models.attention`.

Axes: B batch, T query, S key, D anchor width, E augment width, N heads, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax.errors import CalmError
from calm_jax.models.bridge import Bridge
from calm_jax.models.cache import ComposedCache, KeysValues
from calm_jax.models.calling import call, zeros_beside
from calm_jax.models.config import CompositionConfig, DecoderConfig, heads
from calm_jax.models.connections import Connection, ConnectionPlan, plan_connections
from calm_jax.models.cross_attention import BridgePass
from calm_jax.models.decoder import Decoder
from calm_jax.models.execution import Execution
from calm_jax.models.inputs import Inputs
from calm_jax.models.layer import ForwardPass
from calm_jax.models.parameters import Structure, Tree, module_tree
from calm_jax.models.stack import run_layers
from calm_jax.models.taps import Augment, Perturb


def compose(
    anchor: Decoder,
    augment_or_list: Decoder | Sequence[Decoder],
    config_or_list: CompositionConfig | Sequence[CompositionConfig] | None = None,
    *,
    rngs: nnx.Rngs,
) -> "ComposedDecoder":
    """Joins an anchor and one or more augments by a new bridge.

    The composed model holds the models themselves: their weights are neither copied nor changed.

    Args:
        anchor: m_B, the model that generates.
        augment_or_list: m_A, or several; one may be the anchor itself.
        config_or_list: one `CompositionConfig` an augment, or one for all; default: the default.
        rngs: draws the bridge's initial values.

    Raises:
        CalmError: a connection outside a model's layers, heads that do not divide the width, or
            vocabularies whose token maps differ.

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
        # A model in two roles is two modules over the same arrays, so that each role has a tree.
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
        bridge: all trainable parameters.
        configs: one `CompositionConfig` an augment.
        connections: every connection, in the order in which metrics number them.
        execution: how the bridges are computed; that of each model is its own.
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
        for number, augment in enumerate(augments):
            theirs = getattr(augment, "vocabulary", None)
            check_vocabularies(anchor.vocabulary, "the anchor", theirs, f"augment {number}")
        self.execution = Execution()
        self.anchor = anchor
        self.augments = nnx.List(augments)
        self.bridge = self._init_bridge(rngs)

    @property
    def connections(self) -> tuple[Connection, ...]:
        return self.plan.connections

    @property
    def models(self) -> list[Any]:
        """All that read tokens: the anchor and the augments."""
        return [self.anchor, *self.augments]

    @property
    def part_paths(self) -> dict[str, tuple[str, ...]]:
        """The names of its parts, and the path of each in its tree."""
        augments = {f"augment {k}": ("augments", str(k)) for k in range(len(self.augments))}
        return {"anchor": ("anchor",), **augments, "bridge": ("bridge",)}

    @property
    def vocabulary(self):
        return self.anchor.vocabulary

    @property
    def config(self):
        """The anchor's `DecoderConfig`: what the composed model looks like from outside."""
        return self.anchor.config

    def __call__(self, inputs: Inputs | jax.Array) -> jax.Array:
        """Logits of the next token at every position.

        Args:
            inputs: `Inputs`, or tokens, int32 [B, T], read by the anchor and by every augment.

        Returns:
            float32 [B, T, V], V of the anchor.

        Raises:
            CalmError: `encoder_only` without a mask of the prompt.
        """
        return call(self, "forward", inputs)

    def attention_maps(self, inputs: Inputs | jax.Array) -> list[dict[str, Any]]:
        """What f_cross attends to: for each connection a dict.

        "augment", "from" and "to" name the connection; "weights" is float32 [B, N, T, S].
        """
        weights = call(self, "attention_weights", inputs)
        return [
            {"augment": c.augment, "from": c.layer, "to": c.anchor_layer, "weights": w_BNTS}
            for c, w_BNTS in zip(self.connections, weights, strict=True)
        ]

    def forward(self, inputs: Inputs | jax.Array) -> jax.Array:
        """`__call__` without a compilation of its own: for use inside `jax.jit`."""
        return self.logits(self.residual(Inputs.of(inputs))[0])

    def residual(
        self, inputs: Inputs, cache: ComposedCache | None = None
    ) -> tuple[jax.Array, ComposedCache | None]:
        """The anchor's residual stream [B, T, D], bridged, and the cache with `inputs` in it."""
        x_BTD, cache, _ = self._run(inputs, cache)
        return x_BTD, cache

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The anchor's final norm and head."""
        return self.anchor.logits(x_BTD)

    def attention_weights(self, inputs: Inputs | jax.Array) -> list[jax.Array]:
        """Attention weights of each connection, float32 [B, N, T, S], inside `jax.jit`."""
        return self._run(
            Inputs.of(inputs), observe=lambda h, y, weights: weights, bridge_attention="xla"
        )[2]

    def perturbed(
        self, inputs: Inputs, perturb: Perturb | None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The residual stream as training reads it, and how strong each bridge is.

        Args:
            perturb: what training does to the taps before a bridge reads them.

        Returns:
            the stream [B, T, D]; and for each connection the float32 squared norms [2] of f_cross'
            result and of the anchor's stream it is added to, over all tokens but padding.
        """
        real_BT1 = (inputs.filled().segments_BT != 0)[:, :, None]

        def squared_norms(h_BTD, y_BTD, weights_BNTS):
            pair = [jnp.where(real_BT1, x.astype(jnp.float32), 0) for x in (y_BTD, h_BTD)]
            return jnp.stack([jnp.sum(jnp.square(x)) for x in pair])

        x_BTD, _, norms = self._run(inputs, observe=squared_norms, perturb=perturb)
        return x_BTD, norms

    def run_alone(self, name: str, inputs: Inputs) -> Any:
        """What one of the models, by the name of its part, computes in a forward pass."""
        if name == "anchor":
            return self.anchor.forward(inputs)
        number = int(self.part_paths[name][-1])
        return self.augments[number].taps(inputs, self.plan.tap_layers[number])[0]

    def init_cache(self, batch: int, slots: int, dtype: Any = None) -> ComposedCache:
        """An empty cache of both models and of f_cross, for `batch` rows of `slots` tokens.

        `dtype`: of keys and values; default: each model's own.
        """

        def bridge_cache(entry: tuple[Connection, ...]) -> KeysValues:
            N, H = heads(self.configs[entry[0].augment], self.config)
            kept = dtype or self.config.dtype
            return KeysValues.empty(len(entry), batch, slots, N, H, kept)

        return ComposedCache(
            self.anchor.init_cache(batch, slots, dtype=dtype),
            tuple(
                augment.init_cache(batch, slots, layers[-1] + 1, dtype)
                for augment, layers in zip(self.augments, self.plan.tap_layers, strict=True)
            ),
            zeros_beside(
                lambda: tuple(
                    tuple(map(bridge_cache, round_.entries)) for round_ in self.plan.rounds
                ),
                self.anchor.embedding.get_value(),
            ),
        )

    def _init_bridge(self, rngs: nnx.Rngs) -> Bridge:
        """A new bridge on the anchor's mesh: at full size no single device could hold it."""
        table = self.anchor.embedding.get_value()
        sharding = None if isinstance(table, jax.core.Tracer) else getattr(table, "sharding", None)
        on_mesh = isinstance(sharding, jax.sharding.NamedSharding)
        widths = tuple(augment.width for augment in self.augments)
        structure, init = _bridge_initialiser(
            self.plan, self.configs, self.anchor.config, widths, sharding.mesh if on_mesh else None
        )
        return structure.merge(init(rngs.params()))

    def _run(
        self,
        inputs: Inputs,
        cache: ComposedCache | None = None,
        *,
        observe: Callable[..., Any] = lambda h, y, weights: None,
        perturb: Perturb | None = None,
        bridge_attention: str | None = None,
    ) -> tuple[jax.Array, ComposedCache | None, list[Any]]:
        """The anchor's residual stream with every bridge's result in it, the next cache.

        And for each connection what `observe(h, f_cross result, attention weights)` returns.
        """
        inputs = inputs.filled(None if cache is None else cache.anchor.slots.length_B)
        slots = None if cache is None else cache.anchor.slots.write(inputs)
        taps, augment_caches = [], []
        for number, (augment, tap_layers) in enumerate(
            zip(self.augments, self.plan.tap_layers, strict=True)
        ):
            before = None if cache is None else cache.augments[number]
            tap, after = augment.taps(inputs, tap_layers, before)
            taps.append(tap if perturb is None else tap.perturbed(perturb, number))
            augment_caches.append(after)

        execution = self.execution
        if bridge_attention is not None:
            execution = dataclasses.replace(execution, attention=bridge_attention)
        passes = [
            BridgePass(config, self.config, execution, inputs, slots=slots)
            for config in self.configs
        ]
        forward = ForwardPass(self.config, self.anchor.execution, inputs, slots)
        layers, kept = self.anchor.layers, None if cache is None else cache.anchor.layers
        bridge_caches = ((),) * len(self.plan.rounds) if cache is None else cache.bridge
        observed, next_bridge_caches = {}, []

        def bridged(round_, graphdef, h_BTD, state, entry_taps, kept, number):
            """h + the sum of the bridges' results, all of which read h as it came."""
            sum_BTD, seen, kept = h_BTD, [], list(kept)
            for k, (crossing, entry) in enumerate(
                zip(nnx.merge(graphdef, state), round_.entries, strict=True)
            ):
                bridge_pass = passes[entry[0].augment]
                with jax.named_scope("f_cross"):
                    k_BSNH, v_BSNH = crossing.keys_and_values(
                        entry_taps[k], h_BTD.dtype, bridge_pass
                    )
                    if kept:
                        kept[k] = kept[k].write(number, bridge_pass.slots_BS, k_BSNH, v_BSNH)
                        k_BSNH, v_BSNH = kept[k].of_layer(number, h_BTD.dtype)
                    y_BTD, weights = crossing.attend(h_BTD, k_BSNH, v_BSNH, bridge_pass)
                sum_BTD += y_BTD
                seen.append(observe(h_BTD, y_BTD, weights))
            return sum_BTD, seen, tuple(kept)

        x_BTD = self.anchor.embed(inputs)
        first = self.connections[0].anchor_layer + 1
        h_BTD, kept = run_layers(layers, x_BTD, forward, kept, count=first)
        for round_, crossings, bridge_kept in zip(
            self.plan.rounds, self.bridge.rounds, bridge_caches, strict=True
        ):
            graphdef, state = nnx.split(crossings)
            bridge = execution.rematerialised(
                functools.partial(bridged, round_, graphdef), in_loop=round_.stacked
            )
            follow = functools.partial(run_layers, layers, forward=forward, count=round_.layers)
            entry_taps = [
                taps[entry[0].augment].of(tuple(c.layer for c in entry), round_.stacked)
                for entry in round_.entries
            ]
            if round_.stacked:

                def step(carry, inputs, bridge=bridge, follow=follow):
                    (h_BTD, kept, bridge_kept), (state, entry_taps, number, first) = carry, inputs
                    h_BTD, state = gradients_at_once((h_BTD, state))
                    h_BTD, seen, bridge_kept = bridge(h_BTD, state, entry_taps, bridge_kept, number)
                    h_BTD, kept = follow(h_BTD, cache=kept, first=first)
                    return (h_BTD, kept, bridge_kept), seen

                numbers = jnp.arange(len(round_.entries[0]))
                firsts = round_.first + round_.layers * numbers
                (h_BTD, kept, bridge_kept), seen = jax.lax.scan(
                    step,
                    (h_BTD, kept, bridge_kept),
                    (state, entry_taps, numbers, firsts),
                    unroll=execution.unroll,
                )
            else:
                if round_ is not self.plan.rounds[0]:  # the stream before it has no gradient
                    h_BTD, state = gradients_at_once((h_BTD, state))
                h_BTD, seen, bridge_kept = bridge(h_BTD, state, entry_taps, bridge_kept, 0)
                seen = [None if x is None else x[None] for x in seen]
                h_BTD, kept = follow(h_BTD, cache=kept, first=round_.first)
            next_bridge_caches.append(bridge_kept)
            for entry, values in zip(round_.entries, seen, strict=True):
                each = [None] * len(entry) if values is None else values
                observed.update(zip(entry, each, strict=True))
        if cache is not None:
            anchor = dataclasses.replace(cache.anchor, layers=kept, slots=slots)
            cache = ComposedCache(anchor, tuple(augment_caches), tuple(next_bridge_caches))
        return h_BTD, cache, [observed[connection] for connection in self.connections]


@jax.custom_vjp
def gradients_at_once(tree):
    """`tree`; going backward, nothing reads a gradient of it before all of them are there.

    XLA may put a bridge's own gradient off until all layers below it went backward, and keep until
    then the activations that it is made of.
    """
    return tree


gradients_at_once.defvjp(
    lambda tree: (tree, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),)
)


def check_vocabularies(ours: Any, our_name: str, theirs: Any, their_name: str) -> None:
    """Raises `CalmError` naming the first token that differs; knows nothing without both."""
    if ours is None or theirs is None:
        return
    difference = ours.first_difference(theirs)
    if difference is not None:
        index, our_token, their_token = difference
        raise CalmError(
            f"the vocabularies differ: token {index} is {our_token!r} for {our_name} and "
            f"{their_token!r} for {their_name}"
        )


@functools.cache
def _bridge_initialiser(
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
