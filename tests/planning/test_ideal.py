"""The ideal count against products counted in the traced loss and its gradient."""

import jax
import jax.numpy as jnp
import pytest
import random_models

from calm_jax.data.dataset import own_keys
from calm_jax.models import CompositionConfig
from calm_jax.models.parts import Parts
from calm_jax.planning.ideal import ideal_flops
from calm_jax.training.flops import matmul_flops
from calm_jax.training.loss import loss_sums
from calm_jax.training.step import BATCH_KEYS

B, T = 2, 16
ANCHOR = random_models.llama(num_layers=7, num_kv_heads=1)
AUGMENTS = (
    random_models.palm(num_layers=6, embed_dim=12),
    random_models.gemma(num_layers=4, gated_mlp=False, mlp_dim=28),
)


def batch(own_lengths=()):
    dtypes = {"decoder_loss_weights": jnp.float32}
    arrays = {key: jax.ShapeDtypeStruct((B, T), dtypes.get(key, jnp.int32)) for key in BATCH_KEYS}
    for number, length in enumerate(own_lengths):
        if length:
            arrays |= dict.fromkeys(own_keys(number), jax.ShapeDtypeStruct((B, length), jnp.int32))
    return arrays


def traced_flops(augments, configs, own_lengths=()) -> tuple[int, int]:
    """Of the loss, and of the loss with its gradient."""
    structure = random_models.composed_structure(ANCHOR, augments, configs)
    parts = Parts(structure.merge(structure.abstract()))
    trainable, frozen = parts.abstract()

    def loss(trainable, frozen, batch):
        return loss_sums(parts.merge(trainable, frozen), batch)[0]

    return (
        matmul_flops(loss, trainable, frozen, batch(own_lengths)),
        matmul_flops(jax.grad(loss), trainable, frozen, batch(own_lengths)),
    )


@pytest.mark.parametrize(
    "config",
    [
        CompositionConfig(connections=((1, 1), (3, 4))),
        CompositionConfig(connections=((0, 6),)),
        CompositionConfig(connections=((1, 2), (2, 2), (4, 5)), num_heads=2, head_dim=4),
        CompositionConfig(connections=((2, 0), (5, 6)), norms=False, bias=True, gate=True),
        CompositionConfig(connections=((2, 3),), norms=False, output_projection=False),
        CompositionConfig(every=2, scan=False, rotary=True),
        CompositionConfig(every=2),
    ],
)
def test_one_augment(config):
    forward, step = traced_flops(AUGMENTS[:1], (config,))
    ideal = ideal_flops(ANCHOR, AUGMENTS[:1], (config,), B, T)
    assert ideal.augments + ideal.anchor_forward + ideal.bridge_forward == forward
    assert ideal.total == step


def test_two_augments():
    configs = (CompositionConfig(every=3), CompositionConfig(connections=((1, 4), (2, 6))))
    forward, step = traced_flops(AUGMENTS, configs)
    ideal = ideal_flops(ANCHOR, AUGMENTS, configs, B, T)
    assert ideal.augments + ideal.anchor_forward + ideal.bridge_forward == forward
    assert ideal.total == step


@pytest.mark.parametrize("own_lengths", [(24, None), (None, 10), (24, 10)])
def test_augments_with_tokens_of_their_own(own_lengths):
    configs = (CompositionConfig(every=3), CompositionConfig(connections=((1, 4), (2, 6))))
    forward, step = traced_flops(AUGMENTS, configs, own_lengths)
    ideal = ideal_flops(ANCHOR, AUGMENTS, configs, B, T, own_lengths)
    assert ideal.augments + ideal.anchor_forward + ideal.bridge_forward == forward
    assert ideal.total == step


def test_recomputed_is_the_forward_pass_above_the_first_connection():
    """So it is the whole forward pass less the layers below, the head and the augment."""
    config = CompositionConfig(connections=((1, 2), (3, 5)))
    ideal = ideal_flops(ANCHOR, AUGMENTS[:1], (config,), B, T)
    lower = ideal_flops(
        random_models.llama(num_layers=3, num_kv_heads=1),
        AUGMENTS[:1],
        (CompositionConfig(connections=((1, 2),)),),
        B,
        T,
    )
    assert ideal.recomputed == (ideal.anchor_forward + ideal.bridge_forward - lower.anchor_forward)
    assert ideal.total_rematerialised == ideal.total + ideal.recomputed
