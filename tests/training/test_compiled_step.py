"""What XLA compiled for a step: its arithmetic against the ideal, and what it never holds."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from random_models import llama, palm

from calm_jax import sharding
from calm_jax.models import CompositionConfig, Decoder, compose
from calm_jax.models.execution import Execution
from calm_jax.models.parts import Parts
from calm_jax.planning.ideal import ideal_flops
from calm_jax.training import configuration
from calm_jax.training.optimizer import make_optimizer
from calm_jax.training.step import BATCH_KEYS, Shardings, make_train_step

# Wide, so that products are nearly all that is counted; nothing of it is run.
ROWS, LENGTH, VOCAB = 16, 256, 5120
ANCHOR = llama(
    vocab_size=VOCAB, embed_dim=1024, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=128,
    mlp_dim=4096,
)  # fmt: skip
AUGMENT = palm(
    vocab_size=VOCAB, embed_dim=512, num_layers=4, num_heads=4, head_dim=128, mlp_dim=2048
)


def compiled_step(anchor, composition: CompositionConfig, execution: Execution, **options):
    """The whole step, compiled for one device."""
    model = nnx.eval_shape(
        lambda: compose(
            Decoder(anchor, nnx.Rngs(0)), Decoder(AUGMENT, nnx.Rngs(1)), composition,
            rngs=nnx.Rngs(2),
        )
    )  # fmt: skip
    model.execution = model.anchor.execution = model.augments[0].execution = execution
    parts, mesh = Parts(model), sharding.make_mesh({}, jax.devices()[:1])
    optimizer, schedule = make_optimizer(configuration.composed_run().optimizer, 100, {})
    shardings = Shardings.of(parts, optimizer, mesh)
    step = make_train_step(parts, optimizer, shardings, schedule=schedule, **options)
    trainable, frozen = parts.abstract()
    batch = {
        key: jax.ShapeDtypeStruct(
            (ROWS, LENGTH), jnp.float32 if key == "decoder_loss_weights" else jnp.int32
        )
        for key in BATCH_KEYS
    }
    index = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = (trainable, jax.eval_shape(optimizer.init, trainable), frozen, batch, index)
    return step.lower(*arguments).compile()


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(
    ("depth", "connections"), [(4, ((1, 1), (3, 2))), (8, ((0, 1), (1, 3), (2, 5)))]
)
def test_the_compiled_step_does_little_but_the_ideal(depth, connections, remat):
    anchor = dataclasses.replace(ANCHOR, num_layers=depth)
    composition = CompositionConfig(connections=connections, num_heads=8)
    ideal = ideal_flops(anchor, (AUGMENT,), (composition,), ROWS, LENGTH)
    # XLA counts the body of a loop once.
    execution = Execution(remat=remat, unroll=True)
    found = compiled_step(anchor, composition, execution).cost_analysis()["flops"]
    if remat == "none":
        assert 0.99 < found / ideal.total <= 1.03, found / ideal.total
    else:  # no backward pass needs the last products of a layer again
        assert ideal.total + 0.6 * ideal.recomputed < found <= 1.03 * ideal.total_rematerialised


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_stacked_weight_is_copied_and_no_logits_of_the_whole_length_exist(remat):
    composition = CompositionConfig(connections=((0, 1), (1, 3), (2, 5)), num_heads=16)
    compiled = compiled_step(ANCHOR, composition, Execution(remat=remat), loss_chunk=64)
    made = re.findall(r"= \(?(\w+\[[\d,]*\])\S* ([\w\-]+)\(", compiled.as_text())
    passed_on = {"parameter", "get-tuple-element", "bitcast", "while"}
    for weight in ("1024,4096", "4096,1024", "1024,8,128"):
        stack = f"f32[8,{weight}]"
        assert (stack, "parameter") in made
        assert {operation for shape, operation in made if shape == stack} <= passed_on
        # Nor are layers kept, as they come out of it, for the backward pass.
        kept = {shape for shape, _ in made if re.fullmatch(rf"f32\[\d+,(\d+,)?{weight}\]", shape)}
        assert kept <= {stack, f"f32[1,{weight}]"}, kept
    logits = {shape for shape, _ in made if shape.endswith(f",{VOCAB}]")}
    assert f"f32[{ROWS},64,{VOCAB}]" in logits
    assert f"f32[{ROWS},{LENGTH},{VOCAB}]" not in logits
