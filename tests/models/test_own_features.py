"""Augments that read features, such as images, at places in the anchor's text."""

import jax
import numpy as np
import optax
import pytest
import tiny_models
from feature_encoders import Encoder, random_items
from flax import nnx
from random_models import as_inputs, assert_close, packed_batch, palm, random_decoder

from calm_jax import sharding
from calm_jax.data import own_features, own_tokens
from calm_jax.data.dataset import own_keys
from calm_jax.data.own_features import Placed
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Inputs, compose
from calm_jax.models.execution import Execution
from calm_jax.models.parts import Parts
from calm_jax.training.costs import tree_costs
from calm_jax.training.step import Shardings, make_train_step

OPTIONS = {
    "paper": {},
    "rotary": {"rotary": True, "bias": True, "gate": True},
    "only the prompt": {"encoder_only": True},
}
# For each row of `packed_batch` the indices of its places.
PLACES = [[1, 7], [4], [2, 5, 6]]


def config(**options):
    return CompositionConfig(connections=((0, 0), (2, 1)), init="paper", **options)


def pair(options=None):
    composed = compose(
        random_decoder(palm()), Encoder(nnx.Rngs(1)), config(**(options or {})), rngs=nnx.Rngs(2)
    )
    return tiny_models.randomised(composed)


def packed():
    """The decoder's arrays of `packed_batch`, and the items at `PLACES`."""
    tokens, positions, segments, prompt = packed_batch()
    batch = {
        "decoder_input_tokens": tokens,
        "decoder_positions": positions,
        "decoder_segment_ids": segments,
        "decoder_causal_attention": prompt,
    }
    return batch, [Placed(random_items(k, len(order)), order) for k, order in enumerate(PLACES)]


@pytest.mark.parametrize("backend", ["xla", "chunked"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_of_logits_by_the_features(name, backend):
    """An item moves the logits from its place on, to the end of its sequence, and no others."""
    composed = pair(OPTIONS[name])
    composed.execution = Execution(attention=backend)
    batch, rows = packed()
    inputs = Inputs.of_batch(batch | own_features.own_arrays(0, (3, 5), rows, batch))
    (own,) = inputs.augments

    def logits_of(features_BSF):
        changed = own.replace(features_BTD=features_BSF)
        return composed.forward(inputs.replace(augments=(changed,)))[..., 0]

    jacobian = jax.jit(jax.jacrev(logits_of))(own.features_BTD)
    moved_BTCS = np.any(np.asarray(jacobian) != 0, axis=-1)
    segments, prompt = batch["decoder_segment_ids"], batch["decoder_causal_attention"]
    expected = np.zeros((3, 11, 3, 9), bool)
    for row, order in enumerate(PLACES):
        for number, place in enumerate(order):
            for t in range(place, 11):
                asked = name != "only the prompt" or prompt[row, place]
                same = segments[row, t] == segments[row, place]
                expected[row, t, row, 3 * number : 3 * number + 3] = asked and same
    np.testing.assert_array_equal(moved_BTCS, expected)
    assert expected.any()


def test_a_row_without_items_is_the_anchors():
    composed = pair()
    batch, rows = packed()
    rows[1] = Placed()
    arrays = batch | own_features.own_arrays(0, (3, 5), rows, batch)
    found = np.asarray(composed(Inputs.of_batch(arrays)))
    alone = np.asarray(composed.anchor(Inputs.of_batch(batch)))
    np.testing.assert_array_equal(found[1], alone[1])
    assert np.all(found[0, 1:5] != alone[0, 1:5])


def test_items_of_a_row_are_read_in_the_order_of_their_places():
    """The same images in two prompts of one row, and in two rows of one prompt."""
    composed, (one, other) = pair(), random_items(0, 2)
    ids = [7, 3, 9, 7, 4]
    both = own_tokens.batch({}, [ids, ids])
    rows = [own_features.placed(ids, 7, images) for images in ((one, other), (other, one))]
    assert rows[0].order == [0, 3]
    arrays = both | own_features.own_arrays(0, (3, 5), rows, both)
    found = composed(Inputs.of_batch(arrays))
    alone = own_tokens.batch({}, [ids])
    alone |= own_features.own_arrays(0, (3, 5), [Placed([one, other], [0, 3])], alone)
    assert_close(found[0], composed(Inputs.of_batch(alone))[0], 1e-5)
    assert np.all(np.any(np.asarray(found[0] != found[1]), axis=-1))


@pytest.mark.slow
def test_a_bridge_to_it_is_trained_on_a_mesh():
    anchor = tiny_models.decoder()
    composed = compose(anchor, Encoder(nnx.Rngs(1)), config(), rngs=nnx.Rngs(2))
    batch = tiny_models.batch()
    rows = [Placed(random_items(row, 1 + row % 2), [0, 1][: 1 + row % 2]) for row in range(8)]
    batch |= own_features.own_arrays(0, (3, 5), rows, batch)
    parts, optimizer, losses = Parts(composed), optax.adam(1e-2), {}
    for shape in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = sharding.make_mesh(shape, None if shape else jax.devices()[:1])
        shardings = Shardings.of(parts, optimizer, mesh)
        # The step donates its arguments.
        trees = jax.tree.map(np.asarray, parts.of(composed))
        trainable, frozen = jax.device_put(trees, (shardings.trainable, shardings.frozen))
        schedule, options = optax.constant_schedule(1e-2), {"accumulate": 2, "noise": 0.3}
        step = make_train_step(parts, optimizer, shardings, schedule=schedule, **options)
        with jax.set_mesh(mesh):
            opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
            placed, losses[bool(shape)] = sharding.put_batch(batch, mesh), []
            for number in range(3):
                trainable, opt_state, metrics = step(
                    trainable, opt_state, frozen, placed, np.int32(number)
                )
                losses[bool(shape)].append(float(metrics["loss"]))
    assert losses[True][2] < losses[True][0]
    assert_close(losses[True], losses[False], 1e-4)


def test_its_costs_are_counted():
    parts = Parts(pair())
    trainable, frozen = parts.abstract()
    costs = {tree["name"]: tree for tree in tree_costs(parts, trainable, {}, frozen)}
    item = 2 * 3 * 5 * 8 + 3 * 2 * (3 * 8 * 8 + 3 * 3 * 8)  # into, then three layers
    assert costs["augment 0"]["flops_per_token"] == item / 32
    assert costs["bridge"]["flops_per_token"] > 0


def test_items_without_a_place_are_refused():
    (item,) = random_items(0, 1)
    with pytest.raises(CalmError, match=r"has places \(token 7\) for 0 items, but 1 are given"):
        own_features.placed([1, 2], 7, [item])
    with pytest.raises(CalmError, match=r"has places \(token 7\) for 2 items, but 1 are given"):
        own_features.placed([7, 2, 7], 7, [item])


def test_items_of_another_shape_are_refused():
    batch = own_tokens.batch({}, [[7]])
    for shape in ((3, 4), (2, 5)):
        rows = [Placed([np.zeros((3, 5)), np.zeros(shape)], [0, 0])]
        message = rf"item 1 for augment 0 has the shape \({shape[0]}, {shape[1]}\), but the augment"
        with pytest.raises(CalmError, match=message + r" reads \(3, 5\): positions and features"):
            own_features.own_arrays(0, (3, 5), rows, batch)


def test_inputs_that_do_not_fit_are_refused():
    composed, tokens = pair(), np.ones((2, 4), np.int32)

    def read(positions, width, order=None):
        own = Inputs(
            None,
            np.zeros((2, positions, width), np.float32),
            order_BT=np.zeros((2, positions if order is None else order), np.int32),
        )
        composed(as_inputs(tokens).replace(augments=(own,)))

    read(6, 5)
    with pytest.raises(CalmError, match="augment 0 reads 5 features a position, its inputs have 4"):
        read(6, 4)
    with pytest.raises(CalmError, match="augment 0 reads items of 3 positions, but its inputs hav"):
        read(7, 5)
    with pytest.raises(CalmError, match="features at 6 positions, but an order of 3"):
        read(6, 5, order=3)
    with pytest.raises(CalmError, match="augment 0 reads features, but its inputs have tokens alo"):
        composed(as_inputs(tokens).replace(augments=(Inputs(tokens, order_BT=tokens),)))
    with pytest.raises(CalmError, match="augment 0 reads features, not tokens, so it needs inputs"):
        composed(tokens)


def test_the_keys_of_a_batch():
    batch, rows = packed()
    arrays = own_features.own_arrays(0, (3, 5), rows, batch)
    _, segments, order, _, prompt = own_keys(0)
    np.testing.assert_array_equal(arrays[order][0], [1, 1, 1, 7, 7, 7, 0, 0, 0])
    np.testing.assert_array_equal(arrays[segments][0], [1, 1, 1, 2, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(arrays[prompt][0], [1, 1, 1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(arrays["augment_0_features"][1, :3], rows[1].items[0])
