"""Calls of models: one program a form, on the devices that hold them, with attention to suit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from calm_jax import sharding
from calm_jax.models import CompositionConfig, Inputs, attention_choice, calling
from calm_jax.models.attention_choice import Need, chosen
from calm_jax.models.parameters import Structure, module_tree
from calm_jax.training.loss import loss_sums

TOKENS = np.random.default_rng(0).integers(1, tiny_models.VOCAB, (4, 8)).astype(np.int32)


def test_three_checkpoints_of_one_form_are_one_program():
    calling._call.clear_cache()
    logits = []
    for seed in range(3):
        decoder = tiny_models.decoder(seed)
        decoder.vocabulary, decoder.source = object(), f"models/{seed}"
        decoder.fingerprint, decoder.loaded_dtype = f"{seed:x}", "float32"
        logits.append(np.asarray(decoder(TOKENS)))
    assert calling._call._cache_size() == 1
    assert not np.allclose(logits[0], logits[1])
    tiny_models.decoder(norm_eps=1e-3)(TOKENS)
    assert calling._call._cache_size() == 2


def test_a_model_on_a_mesh_runs_there_whether_a_mesh_is_set_or_not():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model = tiny_models.randomised(tiny_models.composed())
    structure = Structure(model)
    tree = jax.device_put(module_tree(model), structure.shardings(mesh))
    spread = structure.merge(tree)

    def program():
        forward = jax.jit(lambda tree, tokens: structure.merge(tree).forward(tokens))
        compiled = forward.lower(tree, TOKENS).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled.output_shardings

    def gradients():
        def loss(tree):
            return jnp.sum(jnp.sin(structure.merge(tree).forward(TOKENS)))

        compiled = jax.jit(jax.grad(loss)).lower(tree).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    found, alone, backward = spread(TOKENS), program(), gradients()
    with jax.set_mesh(mesh):
        expected, set_, set_backward = spread(TOKENS), program(), gradients()
    assert found.sharding.is_equivalent_to(expected.sharding, 3)
    assert found.sharding.shard_shape(found.shape) == (1, 8, tiny_models.VOCAB // 2)
    assert alone[0] == set_[0]
    assert alone[1].is_equivalent_to(set_[1], 3)
    assert backward == set_backward
    np.testing.assert_array_equal(found, expected)


def test_attention_that_nobody_chose_suits_the_length(monkeypatch):
    monkeypatch.setattr(attention_choice, "SHORT", 8)
    need = Need.of_decoder("it", tiny_models.decoder().config)

    def backend(queries, keys, **fields):
        sides = [Inputs(jnp.ones((1, length), jnp.int32)).filled() for length in (queries, keys)]
        return chosen("auto", need, sides[0].replace(**fields), sides[1])

    assert backend(8, 8) == "xla"
    assert backend(9, 9) == "chunked"
    # One query of a long cache is no square.
    order = jnp.zeros((1, 1), jnp.int32)
    assert backend(1, 64, order_BT=order) == "xla"
    assert backend(1, 65, order_BT=order) == "chunked"
    assert chosen("xla", need, *[Inputs(jnp.ones((1, 9), jnp.int32)).filled()] * 2) == "xla"


def test_the_default_device_may_be_named_by_its_platform():
    model = tiny_models.decoder()
    with jax.default_device("cpu"):
        found = jax.jit(model.forward)(TOKENS)
    np.testing.assert_array_equal(found, model(TOKENS))


@pytest.mark.parametrize(
    "config",
    [{"connections": ((0, 0), (1, 1), (2, 2))}, pytest.param({"every": 1}, marks=pytest.mark.slow)],
)
def test_noise_does_not_depend_on_how_layers_are_stacked(config):
    """Nor does anything else of the loss."""
    batch, losses = tiny_models.batch(), []
    for scan in (True, False):
        model = tiny_models.composed(CompositionConfig(**config, init="paper", scan=scan))
        assert any(round_.stacked for round_ in model.plan.rounds) == scan
        loss = jax.jit(lambda model=model: loss_sums(model, batch, jax.random.key(1), 0.5)[0])
        losses.append(float(loss()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    still = tiny_models.composed(CompositionConfig(**config, init="paper"))
    assert abs(float(jax.jit(lambda: loss_sums(still, batch)[0])()) - losses[0]) > 1e-3
