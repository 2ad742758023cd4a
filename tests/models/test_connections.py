"""Any connection list works, evenly spaced or not, and however often a model is composed."""

import math

import hypothesis
import hypothesis.strategies as st
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

from calm_jax.models import CompositionConfig, compose
from calm_jax.models.parameters import module_tree


@pytest.fixture(autouse=True, scope="module")
def nothing_compiles_for_long():
    """Operation by operation, for no two connection lists compile alike; waves for random values.

    test_numpy_parity.py has compiled models.
    """

    def waves(key, shape, dtype):
        start = jax.random.key_data(key).astype(jnp.uint32)[1] % 1000
        phases = jnp.arange(math.prod(shape)).reshape(shape) ** 1.5
        return (1.4 * jnp.sin(start + phases)).astype(dtype)

    with jax.disable_jit(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "normal", waves)
        yield


BATCH = tuple(x[:2, :7] for x in packed_batch())


def expected_logits(composed):
    """The composed model's logits and what its connections saw, by numpy."""
    models = [
        (m.config, jax.device_get(module_tree(m))) for m in (composed.anchor, *composed.augments)
    ]
    logits, _ = numpy_calm.composed_logits(
        models[0], models[1:], connection_parameters(composed), composed.configs, *BATCH
    )
    return logits


@st.composite
def connection_lists(draw, augment_layers, anchor_layers):
    pair = st.tuples(st.integers(0, augment_layers - 1), st.integers(0, anchor_layers - 1))
    return tuple(draw(st.lists(pair, min_size=1, max_size=6, unique=True)))


@hypothesis.settings(deadline=None, max_examples=8)
@hypothesis.given(data=st.data())
def test_any_connection_list(data):
    anchor_layers = data.draw(st.sampled_from([1, 4]))
    depths = data.draw(st.lists(st.sampled_from([1, 3]), min_size=1, max_size=2))
    configs = [
        CompositionConfig(connections=data.draw(connection_lists(depth, anchor_layers)))
        for depth in depths
    ]
    augments = [palm(num_layers=depth) for depth in depths]
    composed = random_composed(llama(num_layers=anchor_layers), augments, configs)
    assert_close(composed(as_inputs(*BATCH)), expected_logits(composed))


def test_one_anchor_in_several_compositions():
    anchor, augment = random_decoder(llama(num_layers=7), 1), random_decoder(palm(num_layers=6), 2)
    before = [np.asarray(model(as_inputs(*BATCH[:3]))) for model in (anchor, augment)]
    regular, irregular, other = (
        compose(anchor, augment, config, rngs=nnx.Rngs(3))
        for config in (
            CompositionConfig(every=2, init="paper"),
            CompositionConfig(connections=((5, 5), (1, 1), (3, 3)), init="paper", scan=False),
            CompositionConfig(connections=((4, 5), (0, 6)), init="paper"),
        )
    )
    assert [round_.stacked for round_ in regular.plan.rounds] == [True, False]
    assert [round_.stacked for round_ in irregular.plan.rounds] == [False] * 3

    # Initial values depend on a connection's number alone, not on how rounds are stacked.
    one, two = connection_parameters(regular), connection_parameters(irregular)
    assert one.keys() == two.keys() == {(0, 1, 1), (0, 3, 3), (0, 5, 5)}
    jax.tree.map(np.testing.assert_array_equal, one, two)

    logits = [np.asarray(model(as_inputs(*BATCH))) for model in (regular, irregular, other)]
    assert_close(logits[0], logits[1], 1e-5)
    for model, found in zip((regular, irregular, other), logits, strict=True):
        assert_close(found, expected_logits(model))
    # The models are shared and stay as they were.
    np.testing.assert_array_equal(regular(as_inputs(*BATCH)), logits[0])
    for model, found in zip((anchor, augment), before, strict=True):
        assert_close(model(as_inputs(*BATCH[:3])), found, 1e-6)


def test_one_model_as_anchor_and_augment():
    model = random_decoder(palm(num_layers=4))
    before = np.asarray(model(as_inputs(*BATCH[:3])))
    composed = compose(
        model,
        [model, model],
        [
            CompositionConfig(connections=((2, 0), (0, 3)), init="paper"),
            CompositionConfig(every=2, init="paper"),
        ],
        rngs=nnx.Rngs(1),
    )
    assert_close(composed(as_inputs(*BATCH)), expected_logits(composed))
    assert_close(model(as_inputs(*BATCH[:3])), before, 1e-6)
