"""What XLA compiled for a step, against the arithmetic that no step can do without."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from random_models import llama, palm

from calm_jax import sharding
from calm_jax.models import CompositionConfig, Decoder, compose
from calm_jax.models.execution import Execution
from calm_jax.training import configuration
from calm_jax.training.ideal import ideal_flops
from calm_jax.training.optimizer import make_optimizer
from calm_jax.training.step import BATCH_KEYS, Parts, Shardings, make_train_step

# Wide, so that products are nearly all that is counted; nothing of it is run.
ROWS, LENGTH, VOCAB = 16, 256, 4096
ANCHOR = llama(
    vocab_size=VOCAB, embed_dim=1024, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=128,
    mlp_dim=4096,
)  # fmt: skip
AUGMENT = palm(
    vocab_size=VOCAB, embed_dim=512, num_layers=4, num_heads=4, head_dim=128, mlp_dim=2048
)


def compiled_flops(anchor, composition: CompositionConfig, remat: str) -> float:
    """XLA's own count for the whole step on one device, without loops, which it counts once."""
    model = nnx.eval_shape(
        lambda: compose(
            Decoder(anchor, nnx.Rngs(0)), Decoder(AUGMENT, nnx.Rngs(1)), composition,
            rngs=nnx.Rngs(2),
        )
    )  # fmt: skip
    execution = Execution(remat=remat, unroll=True)
    model.execution = model.anchor.execution = model.augments[0].execution = execution
    parts, mesh = Parts(model), sharding.make_mesh({}, jax.devices()[:1])
    optimizer, schedule = make_optimizer(configuration.composed_run().optimizer, 100)
    shardings = Shardings.of(parts, optimizer, mesh)
    step = make_train_step(parts, optimizer, shardings, schedule=schedule)
    trainable, frozen = parts.abstract()
    batch = {
        key: jax.ShapeDtypeStruct(
            (ROWS, LENGTH), jnp.float32 if key == "decoder_loss_weights" else jnp.int32
        )
        for key in BATCH_KEYS
    }
    index = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = (trainable, jax.eval_shape(optimizer.init, trainable), frozen, batch, index)
    return step.lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(
    ("depth", "connections"), [(4, ((1, 1), (3, 2))), (8, ((0, 1), (1, 3), (2, 5)))]
)
def test_the_compiled_step_does_little_but_the_ideal(depth, connections, remat):
    anchor = dataclasses.replace(ANCHOR, num_layers=depth)
    composition = CompositionConfig(connections=connections, num_heads=8)
    ideal = ideal_flops(anchor, (AUGMENT,), (composition,), ROWS, LENGTH)
    found = compiled_flops(anchor, composition, remat)
    if remat == "none":
        assert 0.99 < found / ideal.total <= 1.03, found / ideal.total
    else:  # no backward pass needs the last products of a layer again
        assert ideal.total + 0.6 * ideal.recomputed < found <= 1.03 * ideal.total_rematerialised
