"""`compose`: step 0, what is never run or differentiated, memory, and what is refused."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import numpy_calm
import pytest
from flax import nnx
from random_models import (
    as_inputs,
    assert_close,
    connection_parameters,
    llama,
    packed_batch,
    palm,
    random_composed,
    random_decoder,
)

from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Decoder, compose
from calm_jax.models.cross_attention import BridgePass, CrossAttention
from calm_jax.models.execution import Execution
from calm_jax.models.parameters import Structure, module_tree, path_name, size_in_bytes

ZERO = {
    "output": CompositionConfig(every=1, bias=True),
    "value": CompositionConfig(every=1, bias=True, output_projection=False),
    "gate": CompositionConfig(every=1, bias=True, gate=True),
}


def fresh_bridge(composed, config):
    """Puts in every place of the bridge values as they are born."""
    width = composed.augments[0].config.embed_dim
    state = nnx.state(CrossAttention(config, composed.config, width, nnx.Rngs(0)))
    for round_ in composed.bridge.rounds:
        for stacked in round_:
            nnx.update(
                stacked,
                jax.tree.map(
                    lambda new, old: jnp.broadcast_to(new, old.shape), state, nnx.state(stacked)
                ),
            )


@pytest.mark.parametrize("name", ZERO)
def test_step_zero_is_the_anchor_bit_for_bit(name):
    composed = random_composed(llama(num_layers=7), (palm(),), ZERO[name])
    batch = packed_batch()
    alone = np.asarray(composed.anchor(as_inputs(*batch[:3])))
    assert np.any(np.asarray(composed(as_inputs(*batch))) != alone)  # with a random bridge
    fresh_bridge(composed, ZERO[name])
    np.testing.assert_array_equal(composed(as_inputs(*batch)), alone)


@pytest.mark.parametrize("name", ZERO)
def test_exactly_one_factor_begins_at_zero_and_then_all_learn(name):
    config = ZERO[name]
    crossing = CrossAttention(config, palm(), 6, nnx.Rngs(0))
    structure, tree = Structure(crossing), module_tree(crossing)
    random = np.random.default_rng(0)
    h_BTD, goal_BTD = random.normal(size=(2, 1, 5, 16)).astype(np.float32)
    tap_BSE = random.normal(size=(1, 5, 6)).astype(np.float32)
    bridge_pass = BridgePass(config, palm(), Execution(), as_inputs(np.ones((1, 5))).filled())

    def loss(tree):
        crossing = structure.merge(tree)
        k_BSNH, v_BSNH = crossing.keys_and_values(tap_BSE, jnp.float32, bridge_pass)
        return jnp.sum(crossing.attend(h_BTD, k_BSNH, v_BSNH, bridge_pass)[0] * goal_BTD)

    zeros = {key for key, x in tree.items() if not key.endswith("_bias") and not np.any(x)}
    assert zeros == {name}
    gradient = jax.jit(jax.grad(loss))
    for _ in range(2):
        gradients = gradient(tree)
        moved = {key for key, slope in gradients.items() if np.any(slope)}
        tree = jax.tree.map(lambda x, slope: np.asarray(x) - 0.1 * slope, tree, gradients)
    assert moved == tree.keys()


def test_paper_init_draws_every_matrix_by_its_fan_in():
    config = CompositionConfig.paper(every=1, gate=True)
    tree = module_tree(CrossAttention(config, palm(embed_dim=64), 32, nnx.Rngs(0)))
    fan_in = {"projection": 32, "query": 64, "key": 64, "value": 64, "output": 64}
    assert tree.keys() == fan_in.keys() | {"gate"}
    assert tree["gate"] == 1
    for name, inputs in fan_in.items():
        assert np.std(tree[name]) == pytest.approx(inputs**-0.5, rel=0.1)
        assert np.mean(tree[name]) == pytest.approx(0, abs=0.1 * inputs**-0.5)


def test_the_augment_stops_at_its_last_tap_and_the_bridge_alone_is_differentiated():
    config = CompositionConfig(connections=((0, 1), (2, 3)), init="paper")
    composed = random_composed(palm(num_layers=5), (llama(num_layers=5),), config)
    structure, tree = Structure(composed), module_tree(composed)
    batch = packed_batch()

    @jax.jit
    def logits_and_gradients(tree):
        def loss(differentiated):
            logits = structure.merge({**tree, **differentiated}).forward(as_inputs(*batch))
            return jnp.sum(logits**2), logits

        differentiated = {key: tree[key] for key in ("augments", "bridge")}
        return jax.grad(loss, has_aux=True)(differentiated)

    gradients, logits = logits_and_gradients(tree)
    assert all(not np.any(x) for x in jax.tree.leaves(gradients["augments"]))
    assert all(np.any(x) for x in jax.tree.leaves(gradients["bridge"]))

    # NaN in all that must not be read: layers after the last tap, the final norm and the head.
    augment = tree["augments"]["0"]
    norm, head = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan), (augment["final_norm"], augment["head"])
    )
    poisoned = {
        "embedding": augment["embedding"],
        "layers": jax.tree.map(lambda x: x.at[3:].set(jnp.nan), augment["layers"]),
        "final_norm": norm,
        "head": head,
    }
    _, again = logits_and_gradients({**tree, "augments": {"0": poisoned}})
    np.testing.assert_array_equal(again, logits)


def test_bfloat16_models_with_a_float32_bridge():
    config = CompositionConfig(every=1, init="paper", bias=True)
    composed = random_composed(palm(dtype="bfloat16"), (llama(dtype="bfloat16"),), config)
    assert {x.dtype for x in jax.tree.leaves(module_tree(composed.bridge))} == {np.dtype("float32")}
    batch = packed_batch()
    residual, _ = jax.eval_shape(lambda: composed.residual(as_inputs(*batch)))
    assert residual.dtype == jnp.bfloat16
    logits = composed(as_inputs(*batch))
    assert logits.dtype == np.float32
    models = [
        (model.config, jax.device_get(module_tree(model)))
        for model in (composed.anchor, *composed.augments)
    ]
    expected, _ = numpy_calm.composed_logits(
        models[0], models[1:], connection_parameters(composed), (config,), *batch
    )
    assert_close(logits, expected, 0.1)


def live_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def arrays_of(model):
    return {path_name(path): x for path, x in jax.tree.leaves_with_path(module_tree(model))}


def test_composing_leaves_its_models_alone():
    """Neither copied nor replaced, by a second composition with other connections either."""
    anchor = random_decoder(llama(num_layers=8, embed_dim=64, mlp_dim=256), 0)
    augment = random_decoder(palm(num_layers=6, embed_dim=64), 1)
    before, arrays = live_bytes(), [arrays_of(anchor), arrays_of(augment)]
    configs = [CompositionConfig(every=2), CompositionConfig(connections=((1, 0), (4, 3)))]
    pairs = [compose(anchor, augment, config, rngs=nnx.Rngs(0)) for config in configs]
    bridges = sum(size_in_bytes(module_tree(pair.bridge)) for pair in pairs)
    small = 4096  # keys and masks
    assert live_bytes() <= before + bridges + small
    assert size_in_bytes(module_tree(anchor)) > 2 * small  # so that a copy would show
    tokens = np.ones((1, 3), np.int32)
    for pair in (*pairs, *pairs):
        pair(tokens)
        for model, was in zip((pair.anchor, pair.augments[0]), arrays, strict=True):
            now = arrays_of(model)
            assert now.keys() == was.keys()
            assert all(now[path] is was[path] for path in was)


@pytest.mark.parametrize("connections", [None, ((0, 1), (2, 3), (2, 6))])
def test_no_stack_of_weights_is_made_inside_a_call(connections):
    composed = random_composed(
        llama(num_layers=8), (palm(num_layers=4),), CompositionConfig(connections, every=1)
    )
    structure, tree = Structure(composed), module_tree(composed)
    jaxpr = jax.make_jaxpr(lambda tree, tokens: structure.merge(tree).forward(tokens))(
        tree, np.ones((1, 3), np.int32)
    )
    stacks = {x.shape for model in ("anchor", "augments") for x in jax.tree.leaves(tree[model])}
    made = {x.aval.shape for equation in jaxpr.jaxpr.eqns for x in equation.outvars}
    assert not {shape for shape in stacks & made if len(shape) > 2}


class Tokens:
    """A vocabulary as the models see it."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def first_difference(self, other):
        for index, (ours, theirs) in enumerate(zip(self.tokens, other.tokens, strict=True)):
            if ours != theirs:
                return index, ours, theirs
        return None


def test_vocabularies():
    """An augment with another vocabulary than the anchor's has tokens of its own."""

    def composed(*vocabularies):
        def make():
            models = [Decoder(palm(), nnx.Rngs(0)) for _ in vocabularies]
            for model, vocabulary in zip(models, vocabularies, strict=True):
                model.vocabulary = vocabulary
            configs = [CompositionConfig(every=1)] * 2
            return compose(models[0], models[1:], configs, rngs=nnx.Rngs(0))

        return nnx.eval_shape(make)

    vocabulary = Tokens("a", "b")
    shared = composed(vocabulary, Tokens("a", "b"), None)
    assert shared.vocabulary is vocabulary and shared.own_tokens == (False, False)
    assert composed(vocabulary, vocabulary, Tokens("a", "c")).own_tokens == (False, True)


def test_embedding_rows_may_differ_and_logits_have_the_anchors():
    composed = random_composed(
        palm(vocab_size=30), (llama(vocab_size=26),), CompositionConfig(every=1)
    )
    shape = jax.eval_shape(lambda: composed.forward(as_inputs(*packed_batch()))).shape
    assert shape == (3, 11, 30)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CompositionConfig(connections=((0, 3),)), r"\(0, 3\) names anchor layer 3, .* 0 to 2"),
        (CompositionConfig(connections=((5, 0),)), r"\(5, 0\) names augment layer 5, .* 0 to 2"),
        (CompositionConfig(every=4), "every=4 gives no valid connections"),
        (CompositionConfig(every=1, num_heads=3), "num_heads 3 does not divide .* width 16"),
        ([CompositionConfig(every=1)] * 2, "2 composition configs were given for 1 augments"),
    ],
)
def test_refused(config, message):
    anchor, augment = random_decoder(palm()), random_decoder(llama())
    with pytest.raises(CalmError, match=message):
        compose(anchor, augment, config, rngs=nnx.Rngs(0))


def test_one_config_for_several_augments():
    models = [random_decoder(palm(), seed) for seed in range(3)]
    pair = compose(models[0], models[1:], CompositionConfig(every=3), rngs=nnx.Rngs(0))
    assert [(c.augment, c.layer, c.anchor_layer) for c in pair.connections] == [
        (0, 2, 2),
        (1, 2, 2),
    ]


def test_models_on_different_devices():
    anchor, augment = random_decoder(palm()), random_decoder(llama())
    config = CompositionConfig(every=3)
    nnx.update(augment, jax.device_put(nnx.state(augment), jax.devices()[1]))
    # Arrays that nobody placed go where they are needed.
    compose(anchor, augment, config, rngs=nnx.Rngs(0))
    nnx.update(anchor, jax.device_put(nnx.state(anchor), jax.devices()[0]))
    with pytest.raises(CalmError, match=r"on devices \[0\], augment 0 on devices \[1\]; load"):
        compose(anchor, augment, config, rngs=nnx.Rngs(0))


def test_no_augment():
    with pytest.raises(CalmError, match="at least one augment"):
        compose(random_decoder(palm()), [], rngs=nnx.Rngs(0))
