"""An augment that is no decoder: all that is asked of it is in `calm_jax.models.taps`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from flax import nnx

from calm_jax import sharding
from calm_jax.checkpoints.composed import export_bridge, load_composed
from calm_jax.decoding import Generator
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, compose
from calm_jax.models.parts import Parts
from calm_jax.models.taps import Taps
from calm_jax.training.configuration import composed_run
from calm_jax.training.costs import tree_costs
from calm_jax.training.run_model import set_execution
from calm_jax.training.step import Shardings, make_train_step

TOKENS = np.random.default_rng(0).integers(1, tiny_models.VOCAB, (8, 12)).astype(np.int32)


class Table(nnx.Module):
    """Tokens' vectors, turned a little by each of its layers; plain parameters without axes."""

    width, depth = 8, 3

    def __init__(self, rngs: nnx.Rngs):
        self.vectors = nnx.Param(rngs.params.normal((tiny_models.VOCAB, self.width)))
        self.turn = nnx.Param(rngs.params.normal((self.width, self.width)) / 3)

    def taps(self, inputs, layers, cache=None):
        x_BSE, found = self.vectors[...][inputs.tokens_BT], {}
        for layer in range(layers[-1] + 1):
            x_BSE = jnp.tanh(x_BSE @ self.turn[...])
            if layer in layers:
                found[layer] = x_BSE
        return Taps(found), cache

    def init_cache(self, batch, slots, layers=None, dtype=None):
        return ()


def pair():
    config = CompositionConfig(connections=((0, 1), (2, 3)))
    return compose(tiny_models.decoder(), Table(nnx.Rngs(1)), config, rngs=nnx.Rngs(2))


def test_it_is_read():
    model = pair()
    np.testing.assert_array_equal(model(TOKENS), model.anchor(TOKENS))
    tiny_models.randomised(model)
    before = np.asarray(model(TOKENS))
    model.augments[0].vectors.set_value(model.augments[0].vectors.get_value() + 1)
    assert np.any(np.asarray(model(TOKENS)) != before)


@pytest.mark.parametrize("shape", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_bridge_to_it_is_trained(shape):
    """On a mesh every device holds all of it."""
    model, optimizer = pair(), optax.adam(1e-2)
    mesh = sharding.make_mesh(shape, None if shape else jax.devices()[:1])
    config = composed_run()
    config.data.length, config.attention = 12, "xla"
    set_execution(model, config, jax.devices()[0])
    parts = Parts(model)
    shardings = Shardings.of(parts, optimizer, mesh)
    trainable, frozen = jax.device_put(parts.of(model), (shardings.trainable, shardings.frozen))
    step = make_train_step(parts, optimizer, shardings, schedule=optax.constant_schedule(1e-2))
    with jax.set_mesh(mesh):
        opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
        batch, losses = sharding.put_batch(tiny_models.batch(), mesh), []
        for number in range(3):
            trainable, opt_state, metrics = step(
                trainable, opt_state, frozen, batch, sharding.put_replicated(np.int32(number), mesh)
            )
            losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]
    held = frozen["augments"]["0"]["vectors"].sharding
    assert held.is_equivalent_to(sharding.replicated(mesh), 2)


def test_its_costs_are_counted():
    parts = Parts(pair())
    trainable, frozen = parts.abstract()
    costs = {tree["name"]: tree for tree in tree_costs(parts, trainable, {}, frozen)}
    assert costs["augment 0"]["parameters"] == tiny_models.VOCAB * 8 + 8 * 8
    assert costs["augment 0"]["flops_per_token"] == 3 * 2 * 8 * 8
    assert not costs["augment 0"]["trained"] and costs["bridge"]["flops_per_token"] > 0


def test_a_folder_of_it_does_not_exist(tmp_path):
    with pytest.raises(CalmError, match="augment 0 is a Table; only decoders and image enc"):
        export_bridge(pair(), tmp_path / "bridge")
    assert not (tmp_path / "bridge").exists()
    ours = compose(tiny_models.decoder(), tiny_models.decoder(1), rngs=nnx.Rngs(2))
    export_bridge(ours, tmp_path / "bridge")
    with pytest.raises(CalmError, match="augment 0 is a Table; only decoders and image enc"):
        load_composed(tmp_path / "bridge", anchor=ours.anchor, augments=[Table(nnx.Rngs(1))])


def test_answers_need_decoders():
    with pytest.raises(CalmError, match="augment 0 is a Table; only decoders can be decoded"):
        Generator(pair(), max_length=16)
