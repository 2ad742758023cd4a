"""Whole models by chunked attention against XLA's: logits, gradients, weights and memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from random_models import (
    as_inputs,
    assert_close,
    gemma,
    llama,
    packed_batch,
    random_composed,
    random_decoder,
)

from calm_jax import sharding
from calm_jax.models import ComposedDecoder, CompositionConfig, chunked_attention
from calm_jax.models.execution import Execution
from calm_jax.models.parameters import Structure, module_tree

# Local and global layers in turn, capped, as Gemma 2's.
WINDOWS = {"window": 3, "window_pattern": (True, False), "attention_logit_cap": 5.0}


@pytest.fixture
def optimised():
    """Compiles as users do: values that nothing reads are gone only then."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(chunked_attention, "BLOCK", 4)


def execute(model, execution):
    models = [model]
    if isinstance(model, ComposedDecoder):
        models += [model.anchor, *model.augments]
    for one in models:
        one.execution = execution


def logits_and_gradients(model, batch, attention, remat="none"):
    """Logits, and the gradient of a loss by all floating parameters."""
    execute(model, Execution(attention=attention, remat=remat))
    structure = Structure(model)

    @jax.jit
    def run(tree):
        def loss(tree):
            logits = structure.merge(tree).forward(as_inputs(*batch))
            return jnp.sum(jnp.sin(logits) * (batch[2] != 0)[:, :, None]), logits

        return jax.grad(loss, has_aux=True)(tree)

    return run(module_tree(model))


def assert_equal(found, expected, batch):
    real_BT = np.asarray(batch[2]) != 0
    assert_close(np.asarray(found[1])[real_BT], np.asarray(expected[1])[real_BT])
    scale = max(np.max(np.abs(x)) for x in jax.tree.leaves(expected[0]))
    for ours, theirs in zip(*map(jax.tree.leaves, (found[0], expected[0])), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5 * scale)


def test_a_decoder():
    decoder, batch = random_decoder(gemma(**WINDOWS)), packed_batch()[:3]
    assert_equal(*(logits_and_gradients(decoder, batch, x) for x in ("chunked", "xla")), batch)


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_a_composed_model(remat):
    config = CompositionConfig.paper(every=1, encoder_only=remat == "full")
    composed = random_composed(gemma(**WINDOWS), (llama(embed_dim=8),), config)
    batch = packed_batch()
    found = logits_and_gradients(composed, batch, "chunked", remat)
    maps = composed.attention_maps(as_inputs(*batch))
    assert_equal(found, logits_and_gradients(composed, batch, "xla"), batch)
    for ours, theirs in zip(maps, composed.attention_maps(as_inputs(*batch)), strict=True):
        assert_close(ours["weights"], theirs["weights"])


@pytest.mark.slow
def test_a_composed_model_on_a_mesh():
    # Four devices share the anchor's two key heads.
    composed = tiny_models.randomised(tiny_models.composed(window=5, attention_logit_cap=5.0))
    batch = [
        tiny_models.batch(packed=True)[f"decoder_{name}"]
        for name in ("input_tokens", "positions", "segment_ids")
    ]
    expected = logits_and_gradients(composed, batch, "xla")
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    structure = Structure(composed)
    composed = structure.merge(jax.device_put(module_tree(composed), structure.shardings(mesh)))
    with jax.set_mesh(mesh):
        found = logits_and_gradients(composed, batch, "chunked")
    assert_equal(jax.device_get(found), expected, batch)


def test_no_square_of_the_length_exists(monkeypatch, optimised):
    monkeypatch.setattr(chunked_attention, "BLOCK", 32)
    composed = random_composed(
        gemma(**WINDOWS), (llama(embed_dim=8),), CompositionConfig.paper(every=1, encoder_only=True)
    )
    batch = [jnp.ones((1, 96), jnp.int32)] * 4

    def squares(attention):
        execute(composed, Execution(attention=attention))
        structure, tree = Structure(composed), module_tree(composed)

        @jax.jit
        def gradients(bridge):
            def loss(bridge):
                return jnp.sum(
                    structure.merge({**tree, "bridge": bridge}).residual(as_inputs(*batch))[0]
                )

            return jax.grad(loss)(bridge)

        text = gradients.lower(tree["bridge"]).compile().as_text()
        # At once, or as its six blocks that are not in the future.
        return re.findall(r"\[(?:(?:\d+,)*96,96|6,(?:\d+,)*32,32)\]", text)

    assert squares("xla")
    assert not squares("chunked")
