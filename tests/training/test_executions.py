"""However a step is split and computed, twenty of them give the same losses."""

import functools
import itertools

import jax
import numpy as np
import pytest
import tiny_models

from calm_jax import sharding
from calm_jax.models import CompositionConfig
from calm_jax.models.execution import REMAT, Execution
from calm_jax.models.parts import Parts
from calm_jax.training import configuration
from calm_jax.training.optimizer import make_optimizer
from calm_jax.training.step import Shardings, make_train_step

STEPS = 20
# Three evenly spaced connections of an anchor of eight layers: groups, a tail and a first piece.
COMPOSITION = CompositionConfig(connections=((0, 1), (1, 3), (3, 5)), num_heads=8, rotary=True)
AXES = ("slices", "data", "fsdp", "tensor")
MESHES = [
    dict(zip(AXES, sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=4)
    if np.prod(sizes) == 8
]
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


def losses(mesh, *, remat="none", attention="xla", weights="fsdp", loss_chunk=0, devices=None):
    """The losses of the steps, and the bridge's squared norm at the end."""
    model = tiny_models.randomised(tiny_models.composed(COMPOSITION, num_layers=8))
    model.execution = model.anchor.execution = Execution(attention, remat, weights)
    model.augments[0].execution = Execution(attention, weight_sharding=weights)
    parts = Parts(model)
    config = configuration.composed_run()
    optimizer, schedule = make_optimizer(config.optimizer, STEPS, {})
    mesh = sharding.make_mesh(mesh, devices)
    shardings = Shardings.of(parts, optimizer, mesh, sharding.WEIGHT_RULES[weights])
    step = make_train_step(parts, optimizer, shardings, schedule=schedule, loss_chunk=loss_chunk)
    with jax.set_mesh(mesh):
        trainable, frozen = parts.of(model)
        trainable = jax.device_put(jax.tree.map(np.asarray, trainable), shardings.trainable)
        frozen = jax.device_put(frozen, shardings.frozen)
        opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
        found = []
        for index in range(STEPS):
            batch = sharding.put_batch(tiny_models.batch(index, packed=True), mesh)
            number = jax.device_put(np.int32(index), shardings.replicated)
            trainable, opt_state, metrics = step(trainable, opt_state, frozen, batch, number)
            found.append(float(metrics["loss"]))
    return np.array([*found, float(metrics["parameter_norm"])])


@functools.cache
def on_one_device():
    return losses({}, devices=jax.devices()[:1])


def check(found):
    assert len(set(found)) == STEPS + 1
    np.testing.assert_allclose(found, on_one_device(), rtol=2e-5)


@pytest.mark.slow
def test_everything_at_once():
    check(losses(CUBE, remat="full", attention="chunked", weights="all", loss_chunk=5))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh.values())))
def test_every_mesh_of_eight_devices(mesh):
    check(losses(mesh, weights="all" if mesh["data"] > 1 else "fsdp"))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["xla", "chunked"])
@pytest.mark.parametrize("remat", REMAT)
def test_every_policy_and_backend(remat, attention):
    check(losses(CUBE, remat=remat, attention=attention, loss_chunk=7))
