"""The loss in chunks against that of all logits at once: values, and gradients of all it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from calm_jax.models.parameters import Structure, module_tree
from calm_jax.training.cross_entropy import head_loss

B, T, D = 3, 12, 32
HEADS = {
    "tied, capped": {"tied_head": True, "final_logit_cap": 3.0, "logit_scale": 0.5},
    "its own, biased": {"tied_head": False, "head_bias": True},
}


def arrays():
    random = np.random.default_rng(0)
    x_BTD = random.normal(size=(B, T, D)).astype(np.float32)
    targets_BT = random.integers(tiny_models.VOCAB, size=(B, T)).astype(np.int32)
    weights_BT = random.integers(0, 3, size=(B, T)).astype(np.float32)
    return x_BTD, targets_BT, weights_BT


def assert_same(found, expected):
    """To 1e-6 of each array's largest entry."""

    def check(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * max(1e-9, float(np.max(np.abs(y)))))

    jax.tree.map(check, found, expected)


@pytest.mark.parametrize("chunk", [1, 4, 5, 11])
@pytest.mark.parametrize("head", HEADS)
def test_of_a_decoder_that_is_trained(head, chunk):
    decoder = tiny_models.decoder(family="llama", **HEADS[head])
    structure, (x_BTD, targets_BT, weights_BT) = Structure(decoder), arrays()

    def loss(tree, x_BTD, chunk):
        value, right_BT = head_loss(structure.merge(tree), x_BTD, targets_BT, weights_BT, chunk)
        return 3.0 * value, right_BT

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    tree = module_tree(decoder)
    (expected, right), gradients = gradient(tree, x_BTD, 0)
    (found, found_right), found_gradients = gradient(tree, x_BTD, chunk)
    np.testing.assert_array_equal(found_right, right)
    assert_same((found, found_gradients), (expected, gradients))
    assert np.any(gradients[0]["embedding" if HEADS[head]["tied_head"] else "head"])
    # Nobody asks for a gradient in a validation.
    assert_same(loss(tree, x_BTD, chunk)[0], expected)


@pytest.mark.parametrize("chunk", [4, 5])
def test_of_a_frozen_anchor(chunk):
    composed = tiny_models.composed()
    x_BTD, targets_BT, weights_BT = arrays()

    def loss(x_BTD, chunk):
        return head_loss(composed, x_BTD, targets_BT, weights_BT, chunk)[0]

    expected = jax.value_and_grad(loss)(x_BTD, 0)
    assert_same(jax.value_and_grad(loss)(x_BTD, chunk), expected)


def test_in_narrow_arithmetic_the_gradient_has_the_streams_dtype():
    composed = tiny_models.composed(dtype="bfloat16")
    x_BTD, targets_BT, weights_BT = arrays()

    def loss(x_BTD, chunk):
        return head_loss(composed, x_BTD, targets_BT, weights_BT, chunk)[0]

    whole = jax.grad(loss)(x_BTD.astype(jnp.bfloat16), 0)
    chunked = jax.grad(loss)(x_BTD.astype(jnp.bfloat16), 5)
    assert whole.dtype == chunked.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        chunked.astype(np.float32), whole.astype(np.float32), rtol=2**-7, atol=1e-3
    )
