"""The composed model: a frozen anchor that reads frozen augments through a trainable bridge.

CALM, arXiv 2401.02412. The augments run first, forward only, each up to its last tap; their
language model heads are never computed. Every rule of what a token may see is in
`calm_jax.models.bridge`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax.errors import CalmError
from calm_jax.models.attention import SelfAttentionInputs
from calm_jax.models.bridge import BridgeInputs, CrossAttention, heads
from calm_jax.models.config import CompositionConfig, DecoderConfig
from calm_jax.models.connections import Connection, ConnectionPlan, Round, plan_connections
from calm_jax.models.decoder import Decoder, fill_inputs
from calm_jax.models.execution import Execution
from calm_jax.models.parameters import Structure, module_tree, stacked

# (hidden states [..., B, S, E], augment, first of their layers) -> the states to read instead.
Perturb = Callable[[jax.Array, int, int], jax.Array]


def compose(
    anchor: Decoder,
    augment_or_list: Decoder | Sequence[Decoder],
    config_or_list: CompositionConfig | Sequence[CompositionConfig] | None = None,
    *,
    rngs: nnx.Rngs,
) -> "ComposedDecoder":
    """Joins an anchor and one or more augments by a new bridge.

    The layers of the models are cut at the connections in place, so no second copy of the weights
    is held; the models stay usable and compute what they did.

    Args:
        anchor: m_B, the model that generates.
        augment_or_list: m_A, or several.
        config_or_list: one `CompositionConfig` an augment; default: the default config for each.
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
    augments = [augment_or_list] if isinstance(augment_or_list, Decoder) else list(augment_or_list)
    if config_or_list is None:
        config_or_list = [CompositionConfig()] * len(augments)
    configs = (
        [config_or_list] if isinstance(config_or_list, CompositionConfig) else list(config_or_list)
    )
    # One model in two roles is cut in two ways: each role is a module of its own over the arrays.
    models = [anchor]
    for augment in augments:
        alone = all(augment is not model for model in models)
        models.append(augment if alone else nnx.merge(*nnx.split(augment)))
    return ComposedDecoder(anchor, models[1:], configs, rngs)


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
        augments: Sequence[Decoder],
        configs: Sequence[CompositionConfig],
        rngs: nnx.Rngs,
    ):
        if not augments:
            raise CalmError("compose needs at least one augment")
        self.configs = tuple(configs)
        self.plan = plan_connections(
            configs, anchor.config.num_layers, [a.config.num_layers for a in augments]
        )
        self.head_dims = tuple(heads(config, anchor.config)[1] for config in configs)
        for number, augment in enumerate(augments):
            check_vocabularies(
                anchor.vocabulary, "the anchor", augment.vocabulary, f"augment {number}"
            )
        self.execution = Execution()
        self.anchor = anchor
        self.augments = nnx.List(augments)
        self.bridge = self._init_bridge(rngs)
        self.cut()

    @property
    def connections(self) -> tuple[Connection, ...]:
        return self.plan.connections

    @property
    def vocabulary(self):
        return self.anchor.vocabulary

    @property
    def config(self):
        """The anchor's `DecoderConfig`: what the composed model looks like from outside."""
        return self.anchor.config

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        prompt_mask_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the next token at every position.

        Args:
            tokens_BT: int32 [B, T], read by the anchor and by every augment.
            positions_BT, segment_ids_BT: as for `Decoder`.
            prompt_mask_BT: int32 [B, T], 1 on prompt tokens (`decoder_causal_attention`); needed by
                `encoder_only` alone.

        Returns:
            float32 [B, T, V], V of the anchor.

        Raises:
            CalmError: `encoder_only` without `prompt_mask_BT`.
        """
        return self._apply("forward", tokens_BT, positions_BT, segment_ids_BT, prompt_mask_BT)

    def attention_maps(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        prompt_mask_BT: jax.Array | None = None,
    ) -> list[dict[str, Any]]:
        """What f_cross attends to: for each connection a dict.

        "augment", "from" and "to" name the connection; "weights" is float32 [B, N, T, S].
        """
        weights = self._apply("weights", tokens_BT, positions_BT, segment_ids_BT, prompt_mask_BT)
        return [
            {"augment": c.augment, "from": c.layer, "to": c.anchor_layer, "weights": w_BNTS}
            for c, w_BNTS in zip(self.connections, weights, strict=True)
        ]

    def forward(
        self, tokens_BT, positions_BT=None, segment_ids_BT=None, prompt_mask_BT=None
    ) -> jax.Array:
        """`__call__` without a compilation of its own: for use inside `jax.jit`."""
        return self.logits(self.residual(tokens_BT, positions_BT, segment_ids_BT, prompt_mask_BT))

    def residual(
        self, tokens_BT, positions_BT=None, segment_ids_BT=None, prompt_mask_BT=None
    ) -> jax.Array:
        """The anchor's residual stream [B, T, D], bridged, that `logits` reads."""
        return self.bridged(tokens_BT, positions_BT, segment_ids_BT, prompt_mask_BT)[0]

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The anchor's final norm and head."""
        return self.anchor.logits(x_BTD)

    def weights(self, tokens_BT, positions_BT=None, segment_ids_BT=None, prompt_mask_BT=None):
        """Attention weights of each connection, float32 [B, N, T, S], inside `jax.jit`."""
        positions_BT, segment_ids_BT = fill_inputs(tokens_BT, positions_BT, segment_ids_BT)
        return self._run(
            tokens_BT, positions_BT, segment_ids_BT, prompt_mask_BT, lambda h, y, weights: weights,
            bridge_attention="xla",
        )[1]  # fmt: skip

    def run_augment(self, number: int, tokens_BT, positions_BT=None, segment_ids_BT=None) -> "Taps":
        """Runs one augment up to its last tap; no gradient flows back into it."""
        augment, remaining = self.augments[number], list(self.plan.tap_layers[number])
        positions_BT, segment_ids_BT = fill_inputs(tokens_BT, positions_BT, segment_ids_BT)
        shared = SelfAttentionInputs(
            augment.config, positions_BT, segment_ids_BT, augment.execution
        )
        x_BTE = augment.embed(tokens_BT)
        taps = Taps({}, (), None)
        for piece, shape in enumerate(augment.layers.shapes):
            if not remaining:
                break
            x_BTE, outputs = augment.layers.run(piece, x_BTE, shared, taps=True)
            outputs = jax.lax.stop_gradient(outputs)
            if len(shape) == 1:
                taps.by_layer[remaining.pop(0)] = outputs
            else:
                taps.stacked_layers, taps.stacked = tuple(remaining[: shape[0]]), outputs
                del remaining[: shape[0]]
        return taps

    def bridged(
        self,
        tokens_BT,
        positions_BT=None,
        segment_ids_BT=None,
        prompt_mask_BT=None,
        perturb: Perturb | None = None,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """`residual`, and how strong each bridge is.

        Args:
            perturb: what training does to the taps before a bridge reads them.

        Returns:
            the stream [B, T, D]; and for each connection the float32 squared norms [2] of f_cross'
            result and of the anchor's stream it is added to, over all tokens but padding.
        """
        positions_BT, segment_ids_BT = fill_inputs(tokens_BT, positions_BT, segment_ids_BT)

        def squared_norms(h_BTD, y_BTD, weights_BNTS):
            real_BT1 = (segment_ids_BT != 0)[:, :, None]
            pair = [jnp.where(real_BT1, x.astype(jnp.float32), 0) for x in (y_BTD, h_BTD)]
            return jnp.stack([jnp.sum(jnp.square(x)) for x in pair])

        return self._run(
            tokens_BT, positions_BT, segment_ids_BT, prompt_mask_BT, squared_norms, perturb
        )

    def _apply(self, method: str, *inputs):
        self.cut()
        graphdef, state = nnx.split(self)
        return _apply(graphdef, method, state, *inputs)

    def _init_bridge(self, rngs: nnx.Rngs) -> "Bridge":
        """A new bridge, born on the anchor's mesh: at full size no single device could hold it."""
        configs = [augment.config for augment in self.augments]
        make = functools.partial(Bridge, self.plan, self.configs, self.anchor.config, configs)
        structure = Structure(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        table = self.anchor.embedding.get_value()
        place = None if isinstance(table, jax.core.Tracer) else getattr(table, "sharding", None)
        on_mesh = isinstance(place, jax.sharding.NamedSharding)
        key = rngs.params()
        tree = jax.jit(
            lambda: module_tree(make(nnx.Rngs(params=key))),
            out_shardings=structure.shardings(place.mesh) if on_mesh else None,
        )()
        return structure.merge(tree)

    def cut(self) -> None:
        """Cuts the models' layers at the connections, unless they are."""
        self.anchor.layers.cut(self.plan.anchor_shapes)
        for augment, shapes in zip(self.augments, self.plan.augment_shapes, strict=True):
            augment.layers.cut(shapes)

    def _run(
        self, tokens_BT, positions_BT, segment_ids_BT, prompt_mask_BT, observe, perturb=None,
        bridge_attention=None,
    ):  # fmt: skip
        """The anchor's residual stream with every bridge's result in it, and what was observed.

        For each connection that is what `observe(h, f_cross result, attention weights)` returns.
        """
        self.cut()  # a later composition may have cut the shared anchor elsewhere
        taps = [
            self.run_augment(number, tokens_BT, positions_BT, segment_ids_BT)
            for number in range(len(self.augments))
        ]
        if perturb is not None:
            taps = [tap.perturbed(perturb, number) for number, tap in enumerate(taps)]
        execution = self.execution
        if bridge_attention is not None:
            execution = dataclasses.replace(execution, attention=bridge_attention)
        bridge_inputs = [
            BridgeInputs(config, head_dim, positions_BT, segment_ids_BT, prompt_mask_BT, execution)
            for config, head_dim in zip(self.configs, self.head_dims, strict=True)
        ]
        shared = SelfAttentionInputs(
            self.anchor.config, positions_BT, segment_ids_BT, self.anchor.execution
        )
        observed = {}

        def bridged(entries, graphdef, h_BTD, state, entry_taps):
            """h + the sum of the bridges' results, all of which read h as it came."""
            sum_BTD, seen = h_BTD, []
            crossings = nnx.merge(graphdef, state)
            for crossing, entry, tap_BSE in zip(crossings, entries, entry_taps, strict=True):
                with jax.named_scope("f_cross"):
                    y_BTD, weights = crossing(h_BTD, tap_BSE, bridge_inputs[entry[0].augment])
                sum_BTD += y_BTD
                seen.append(observe(h_BTD, y_BTD, weights))
            return sum_BTD, seen

        layers = self.anchor.layers
        h_BTD, _ = layers.run(0, self.anchor.embed(tokens_BT), shared)
        for round_, crossings in zip(self.plan.rounds, self.bridge.rounds, strict=True):
            entry_taps = [
                taps[entry[0].augment].of(entry, round_.stacked) for entry in round_.entries
            ]
            graphdef, state = nnx.split(crossings)
            bridge = execution.rematerialised(
                functools.partial(bridged, round_.entries, graphdef), in_loop=round_.stacked
            )
            if round_.stacked:

                def step(h_BTD, inputs, bridge=bridge, round_=round_):
                    state, entry_taps, group = inputs
                    h_BTD, seen = bridge(*gradients_at_once((h_BTD, state)), entry_taps)
                    return layers.run_group(round_.piece, group, h_BTD, shared), seen

                groups = jnp.arange(layers.shapes[round_.piece][0])
                h_BTD, seen = jax.lax.scan(
                    step, h_BTD, (state, entry_taps, groups), unroll=execution.unroll
                )
            else:
                if round_ is not self.plan.rounds[0]:  # the stream before it has no gradient
                    h_BTD, state = gradients_at_once((h_BTD, state))
                h_BTD, seen = bridge(h_BTD, state, entry_taps)
                seen = [x[None] for x in seen]
                if round_.piece is not None:
                    h_BTD, _ = layers.run(round_.piece, h_BTD, shared)
            for entry, values in zip(round_.entries, seen, strict=True):
                observed.update(zip(entry, values, strict=True))
        return h_BTD, [observed[connection] for connection in self.connections]


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


class Bridge(nnx.Module):
    """All trainable parameters: for each round its cross-attentions, stacked where the round is.

    The initial values of a connection depend on its number alone, not on how rounds are stacked.
    """

    def __init__(
        self,
        plan: ConnectionPlan,
        configs: Sequence[CompositionConfig],
        anchor: DecoderConfig,
        augments: Sequence[DecoderConfig],
        rngs: nnx.Rngs,
    ):
        keys = jax.random.split(rngs.params(), len(plan.connections))
        number = {connection: index for index, connection in enumerate(plan.connections)}

        def crossings(round_: Round) -> nnx.List:
            made = []
            for entry in round_.entries:
                augment = entry[0].augment
                make = functools.partial(
                    CrossAttention, configs[augment], anchor, augments[augment].embed_dim
                )
                entry_keys = jnp.stack([keys[number[connection]] for connection in entry])
                made.append(stacked(make, entry_keys if round_.stacked else entry_keys[0]))
            return nnx.List(made)

        self.rounds = nnx.List([crossings(round_) for round_ in plan.rounds])


@dataclasses.dataclass
class Taps:
    """An augment's hidden states after its tapped layers; those of stacked groups as one array."""

    by_layer: dict[int, jax.Array]  # [B, S, E] each
    stacked_layers: tuple[int, ...]
    stacked: jax.Array | None  # [G, B, S, E]

    def of(self, entry: tuple[Connection, ...], stacked: bool) -> jax.Array:
        """[G, B, S, E] for a stacked round's entry, else [B, S, E]."""
        if not stacked:
            return self.layer(entry[0].layer)
        layers = tuple(connection.layer for connection in entry)
        if layers == self.stacked_layers:
            return self.stacked
        return jnp.stack([self.layer(layer) for layer in layers])

    def perturbed(self, perturb: Perturb, augment: int) -> "Taps":
        """Every hidden state through `perturb`."""
        by_layer = {layer: perturb(x, augment, layer) for layer, x in self.by_layer.items()}
        if self.stacked is None:
            return Taps(by_layer, (), None)
        stacked = perturb(self.stacked, augment, self.stacked_layers[0])
        return Taps(by_layer, self.stacked_layers, stacked)

    def layer(self, layer: int) -> jax.Array:
        """[B, S, E] after one tapped layer."""
        if layer in self.by_layer:
            return self.by_layer[layer]
        return self.stacked[self.stacked_layers.index(layer)]


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(graphdef, method, state, *inputs):
    return getattr(nnx.merge(graphdef, state), method)(*inputs)
