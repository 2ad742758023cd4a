"""An image encoder as an augment: what its items move, what is trained, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from flax import nnx
from random_models import as_inputs, assert_close

from calm_jax import sharding
from calm_jax.data import own_features, own_tokens
from calm_jax.data.own_features import Placed
from calm_jax.decoding import Generator, Sampling
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Inputs, compose
from calm_jax.models.execution import Execution
from calm_jax.models.image_config import ImageEncoderConfig, PixelScale
from calm_jax.models.image_encoder import ImageEncoder
from calm_jax.models.parts import Parts
from calm_jax.training.costs import tree_costs
from calm_jax.training.loss import loss_sums
from calm_jax.training.step import Shardings, make_train_step

PLACE = 7
SIZES = {
    "image_size": (4, 6),
    "patch_size": (2, 3),
    "channels": 1,
    "embed_dim": 16,
    "num_layers": 3,
    "num_heads": 2,
    "mlp_dim": 24,
}
SHAPE = (5, 6)


def encoder(**fields):
    scale = PixelScale(1 / 255, (0.5,), (0.5,))
    return ImageEncoder(ImageEncoderConfig(**SIZES | fields), nnx.Rngs(1), scale)


def pair(**options):
    config = CompositionConfig(connections=((0, 0), (2, 2)), **options)
    return compose(tiny_models.decoder(), encoder(), config, rngs=nnx.Rngs(2))


def images(count, seed=0):
    shape = (count, 4, 6, 1)
    return np.random.default_rng(seed).integers(256, size=shape).astype(np.uint8)


def with_items(augment, batch, rows):
    return batch | own_features.own_arrays(0, augment.item_shape, rows, batch)


def test_its_taps_are_those_of_one_image_alone():
    """No image moves another, in its row or in another's; the zeros of the class token neither."""
    augment = encoder()
    assert (augment.item_shape, augment.width, augment.depth) == (SHAPE, 16, 3)
    items = np.stack([augment.item(image) for image in images(6)])
    together, cache = augment.taps(Inputs(features_BTD=items.reshape(2, 15, 6)), (0, 2))
    assert cache is None
    alone, _ = augment.taps(Inputs(features_BTD=jnp.asarray(items).at[:, 0].set(9.0)), (0, 1, 2))
    for layer in (0, 2):
        found = together.layer(layer)
        assert found.shape == (2, 15, 16)
        assert_close(found.reshape(6, 5, 16), alone.layer(layer), 1e-5)


def test_all_positions_of_an_image_see_each_other():
    augment = encoder()
    item_PF = augment.item(images(1)[0])
    changed_PPF = item_PF + np.eye(5, dtype=np.float32)[:, :, None]  # one position in each
    features = np.stack([item_PF, *changed_PPF])
    taps, _ = augment.taps(Inputs(features_BTD=features), (0,))
    states = np.asarray(taps.layer(0))
    moved_PP = np.any(states[1:] != states[0], axis=-1)
    expected_PP = np.ones((5, 5), bool)
    expected_PP[0] = False  # what stands at the class token is not read
    np.testing.assert_array_equal(moved_PP, expected_PP)


@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_backends_agree(backend):
    augment, item = encoder(), encoder().item(images(1)[0])
    expected, _ = augment.taps(Inputs(features_BTD=item[None]), (2,))
    augment.execution = Execution(attention=backend)
    found, _ = augment.taps(Inputs(features_BTD=item[None]), (2,))
    assert_close(found.layer(2), expected.layer(2), 1e-5)


def test_an_image_moves_only_what_comes_from_its_place_on():
    composed = tiny_models.randomised(pair(rotary=True))
    one, other = (composed.augments[0].item(image) for image in images(2))
    batch = own_tokens.batch({}, [[3, PLACE, 4, PLACE, 5], [PLACE, 2, PLACE, 6]])
    found = []
    for shown in (one, other):
        rows = [Placed([one, shown], [1, 3]), Placed([one, shown], [0, 2])]
        arrays = with_items(composed.augments[0], batch, rows)
        found.append(np.asarray(composed(Inputs.of_batch(arrays))))
    moved_BT = np.any(found[0] != found[1], axis=-1)
    np.testing.assert_array_equal(moved_BT, [[0, 0, 0, 1, 1], [0, 0, 1, 1, 0]])
    rows = [Placed([one], [1]), Placed()]
    shown = np.asarray(composed(Inputs.of_batch(with_items(composed.augments[0], batch, rows))))
    alone = np.asarray(composed.anchor(Inputs.of_batch(batch)))
    np.testing.assert_array_equal(np.any(shown != alone, axis=-1)[:, :2], [[0, 1], [0, 0]])


def questions(augment):
    """Rows that ask which of eight images stands at a place; the answer is its number."""
    shown, order = images(8), np.random.default_rng(1).permutation(8)
    prompts = [[3, PLACE, 4] if number % 2 else [PLACE, 4] for number in order]
    answers = [[10 + number, 1] for number in order]
    batch = own_tokens.training_batch({}, prompts, answers, 5)
    rows = [
        own_features.placed(prompt, PLACE, [augment.item(shown[number])])
        for prompt, number in zip(prompts, order, strict=True)
    ]
    return with_items(augment, batch, rows), prompts, rows, answers


def test_gradients_reach_the_bridge_alone():
    composed = tiny_models.randomised(pair())
    batch, *_ = questions(composed.augments[0])
    graphdef, state = nnx.split(composed)

    def loss(state):
        return loss_sums(nnx.merge(graphdef, state), batch)[0]

    gradients = nnx.to_pure_dict(jax.jit(jax.grad(loss))(state))
    assert not any(np.any(x) for x in jax.tree.leaves(gradients["augments"]))
    assert all(np.any(x) for x in jax.tree.leaves(gradients["bridge"]))
    trained, frozen = Parts(composed).of(composed)
    assert set(trained) == {"bridge"} and set(frozen) == {"anchor", "augments"}


@pytest.mark.parametrize(
    "shape", [{}, pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow)]
)
def test_a_bridge_to_it_learns_to_name_images(shape):
    composed, optimizer = pair(), optax.adam(1e-2)
    batch, prompts, rows, answers = questions(composed.augments[0])
    mesh = sharding.make_mesh(shape, None if shape else jax.devices()[:1])
    parts = Parts(composed)
    shardings = Shardings.of(parts, optimizer, mesh)
    before = jax.tree.map(np.asarray, parts.of(composed)[1])
    trees = jax.tree.map(np.asarray, parts.of(composed))  # the step donates its arguments
    trainable, frozen = jax.device_put(trees, (shardings.trainable, shardings.frozen))
    step = make_train_step(parts, optimizer, shardings, schedule=optax.constant_schedule(1e-2))
    losses = []
    with jax.set_mesh(mesh):
        opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
        placed = sharding.put_batch(batch, mesh)
        for number in range(5 if shape else 60):
            trainable, opt_state, metrics = step(
                trainable, opt_state, frozen, placed, np.int32(number)
            )
            losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, frozen)
    if not shape:
        assert losses[-1] < 0.1 * losses[0]
        generator = Generator(parts.merge(trainable, frozen), max_length=8, eos_ids=[1])
        found = generator.generate(prompts, Sampling(max_new_tokens=2), [{0: row} for row in rows])
        assert [answer.tokens[:1] for (answer,) in found] == [answer[:1] for answer in answers]


def test_its_costs_are_counted():
    parts = Parts(pair())
    trainable, frozen = parts.abstract()
    costs = {tree["name"]: tree for tree in tree_costs(parts, trainable, {}, frozen)}
    layer = 2 * 5 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 2 * 5 * 5 * 16
    assert costs["augment 0"]["flops_per_token"] == (2 * 5 * 6 * 16 + 3 * layer) / 32


def test_what_does_not_fit_is_refused():
    with pytest.raises(CalmError, match=r"image_size \(4, 6\) is not a multiple of patch_size \(2"):
        encoder(patch_size=(2, 4))
    with pytest.raises(CalmError, match="embed_dim 16 is not a multiple of num_heads 3"):
        encoder(num_heads=3)
    composed = pair()
    with pytest.raises(CalmError, match="augment 0 reads features, not tokens, so it needs inputs"):
        composed(as_inputs(np.ones((1, 3), np.int32)))
    with pytest.raises(CalmError, match="the encoder does not say how pixels become inputs"):
        ImageEncoder(ImageEncoderConfig(**SIZES), nnx.Rngs(0)).item(images(1)[0])
