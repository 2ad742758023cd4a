import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from cases import some_slow
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import stored_bytes

from calm_jax import sharding
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig
from calm_jax.models.parameters import module_tree
from calm_jax.models.parts import Parts
from calm_jax.training import loss
from calm_jax.training import step as step_module
from calm_jax.training.configuration import decoder_run
from calm_jax.training.optimizer import make_optimizer
from calm_jax.training.step import Shardings, make_eval_step, make_train_step


def one_device():
    return sharding.make_mesh({}, jax.devices()[:1])


class Trainer:
    """A model's trees on a mesh, and the step over them."""

    def __init__(self, model, mesh=None, optimizer=None, **options):
        self.mesh = one_device() if mesh is None else mesh
        self.parts = Parts(model)
        optimizer = optax.adamw(1e-2, weight_decay=0.0) if optimizer is None else optimizer
        self.shardings = Shardings.of(self.parts, optimizer, self.mesh)
        self.init = jax.jit(optimizer.init, out_shardings=self.shardings.opt_state)
        # The step donates: the model's own arrays must not be among what it is given.
        self.initial = jax.tree.map(np.array, self.parts.of(model))
        self.reset()
        with jax.set_mesh(self.mesh):
            self.train_step = make_train_step(
                self.parts,
                optimizer,
                self.shardings,
                schedule=optax.constant_schedule(0.5),
                **options,
            )

    def reset(self):
        self.trainable, self.frozen = jax.device_put(
            self.initial, (self.shardings.trainable, self.shardings.frozen)
        )
        self.opt_state = self.init(self.trainable)
        self.done = 0

    def step(self, batch):
        with jax.set_mesh(self.mesh):
            index = jax.device_put(np.int32(self.done), self.shardings.replicated)
            self.trainable, self.opt_state, metrics = self.train_step(
                self.trainable,
                self.opt_state,
                self.frozen,
                sharding.put_batch(batch, self.mesh),
                index,
            )
        self.done += 1
        return {key: float(value) for key, value in metrics.items()}


OPTIONS = {
    "default": CompositionConfig(every=2),
    "no output projection": CompositionConfig(every=2, output_projection=False, rotary=True),
    "gate": CompositionConfig(every=2, gate=True),
    "bias": CompositionConfig(every=2, bias=True),
    "all but an output projection": CompositionConfig(
        every=2, bias=True, gate=True, output_projection=False
    ),
    "no norms": CompositionConfig(every=2, norms=False, encoder_only=True),
    "paper": CompositionConfig.paper(every=2),
    "stacked rounds": CompositionConfig(every=1),
    "irregular": CompositionConfig(connections=((0, 0), (3, 0), (1, 3))),
}


@functools.cache
def trainer_of_option(name):
    return Trainer(tiny_models.composed(OPTIONS[name]))


def trainer_of(name):
    """A trainer as new; compiled once for all tests."""
    trainer_of_option(name).reset()
    return trainer_of_option(name)


@pytest.mark.parametrize(
    "name", some_slow(OPTIONS, ("gate", "bias", "no output projection", "stacked rounds"))
)
def test_five_steps_trace_once_and_move_every_leaf_of_the_bridge_alone(name, monkeypatch):
    traces = []

    def counted(*arguments):
        traces.append(arguments)
        return loss.loss_sums(*arguments)

    monkeypatch.setattr(step_module, "loss_sums", counted)
    model, trainer = tiny_models.composed(OPTIONS[name]), trainer_of(name)
    frozen_before = stored_bytes(trainer.frozen)
    bridge_before = jax.tree.map(np.array, trainer.trainable)
    frozen_arrays = jax.tree.leaves(trainer.frozen)

    for index in range(5):
        trainer.step(tiny_models.batch(index, packed=index % 2 == 1))

    assert len(traces) == 1
    assert not any(array.is_deleted() for array in frozen_arrays)
    assert stored_bytes(trainer.frozen) == frozen_before
    assert (
        frozen_before.keys()
        == stored_bytes(
            {"anchor": module_tree(model.anchor), "augments": [module_tree(model.augments[0])]}
        ).keys()
    )
    stacked = name == "stacked rounds"
    assert (len(model.bridge.rounds), model.plan.rounds[0].stacked) == (
        (2, True) if stacked else (len({c.anchor_layer for c in model.connections}), False)
    )

    def moved(path, before, after):
        # A stacked leaf holds several connections: each of them must have moved.
        rows = len(before) if stacked and path[1].key == "0" else 1
        change = np.abs(np.array(after) - before).reshape(rows, -1).max(axis=1)
        assert np.all(change > 1e-3), path

    jax.tree.map_with_path(moved, bridge_before, trainer.trainable)


def test_lone_decoder_trains_whole():
    model = tiny_models.decoder(family="llama")
    trainer = Trainer(model)
    assert trainer.frozen == {}
    before = stored_bytes(trainer.trainable)
    assert before == stored_bytes(model)
    losses = [trainer.step(tiny_models.batch())["loss"] for _ in range(10)]
    assert losses[-1] < losses[0] - 0.5
    after = stored_bytes(trainer.trainable)
    assert not [path for path in before if before[path] == after[path]]


def test_metrics_are_of_the_parameters_before_the_step():
    trainer = trainer_of("default")
    batch = tiny_models.batch(packed=True)
    with jax.set_mesh(trainer.mesh):
        sums = make_eval_step(trainer.parts, trainer.shardings)(
            trainer.trainable, trainer.frozen, sharding.put_batch(batch, trainer.mesh)
        )
    metrics = trainer.step(batch)
    assert metrics["loss"] == pytest.approx(float(sums["loss"] / sums["weight"]), rel=1e-6)
    assert metrics["tokens"] == batch["decoder_loss_weights"].sum()
    assert metrics["learning_rate"] == 0.5
    assert metrics["connection/0"] == metrics["connection/1"] == 0  # step 0 is the anchor
    assert trainer.step(batch)["connection/1"] > 0


@functools.cache
def descent(make, accumulate):
    """Plain descent at rate 1: the difference of parameters is the gradient itself."""
    model = make()
    if make is tiny_models.composed:
        tiny_models.randomised(model)
    return Trainer(model, optimizer=optax.sgd(1.0), accumulate=accumulate)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("make", [tiny_models.decoder, tiny_models.composed])
def test_four_micro_batches_are_one_batch(make, packed):
    batch = tiny_models.batch(packed=packed, rows=16)
    # One micro-batch with a single token to learn, one with none at all.
    batch["decoder_loss_weights"][1::4] = 0
    batch["decoder_loss_weights"][2::4] = 0
    batch["decoder_loss_weights"][2, 0] = 1
    whole, parts = descent(make, 1), descent(make, 4)
    metrics, gradients = [], []
    for trainer in (whole, parts):
        trainer.reset()
        before = jax.tree.map(np.array, trainer.trainable)
        metrics.append(trainer.step(batch))
        gradients.append(jax.tree.map(np.subtract, before, trainer.trainable))
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradients[-1])))
        assert metrics[-1]["grad_norm"] == pytest.approx(norm, rel=1e-4)
        after = [np.asarray(x) for x in jax.tree.leaves(trainer.trainable)]
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in after))
        assert metrics[-1]["parameter_norm"] == pytest.approx(norm, rel=1e-4)
        assert trainer.train_step._cache_size() == 1  # packed and unpacked share one program

    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)

    def same(path, one, four):
        assert np.abs(one).max() > 1e-5, path
        np.testing.assert_allclose(four, one, rtol=1e-3, atol=2e-6, err_msg=str(path))

    jax.tree.map_with_path(same, *gradients)


MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.mark.parametrize("name", some_slow(MESHES, ("data", "fsdp")))
def test_eight_devices_do_what_one_does(name):
    expected = trainer_of("stacked rounds")
    expected_metrics = [expected.step(tiny_models.batch(k, rows=16)) for k in range(4)]
    mesh = sharding.make_mesh(MESHES[name])
    trainer = Trainer(
        tiny_models.composed(OPTIONS["stacked rounds"]),
        mesh,
        accumulate=2 if name == "all" else 1,
    )
    metrics = [trainer.step(tiny_models.batch(k, rows=16)) for k in range(4)]

    for found, wanted in zip(metrics, expected_metrics, strict=True):
        assert found == pytest.approx(wanted, rel=2e-4, abs=1e-6)
    assert metrics[0]["loss"] != metrics[3]["loss"]
    jax.tree.map_with_path(
        lambda path, one, eight: np.testing.assert_allclose(
            np.asarray(eight), np.asarray(one), rtol=2e-3, atol=2e-4, err_msg=str(path)
        ),
        expected.trainable,
        trainer.trainable,
    )
    crossing = trainer.trainable["bridge"]["rounds"]["0"]["0"]
    fsdp, tensor = (axis if mesh.shape[axis] > 1 else None for axis in ("fsdp", "tensor"))
    for tree in (crossing, trainer.opt_state[0].mu["bridge"]["rounds"]["0"]["0"]):
        # Three connections [G], stacked; then [D, N, H], [E, D] and [D_A, D].
        assert_placed(tree["query"], mesh, (None, fsdp, tensor, None))
        assert_placed(tree["output"], mesh, (None, tensor, None, fsdp))
        assert_placed(tree["projection"], mesh, (None, tensor, fsdp))
    assert_placed(trainer.frozen["anchor"]["embedding"], mesh, (tensor, fsdp))
    layers = trainer.frozen["augments"]["0"]["layers"]
    assert_placed(layers["mlp"]["down"], mesh, (None, tensor, fsdp))


def assert_placed(array, mesh, spec):
    wanted = NamedSharding(mesh, PartitionSpec(*spec))
    assert array.sharding.is_equivalent_to(wanted, array.ndim), (array.sharding, wanted)
    ways = [1 if axis is None else mesh.shape[axis] for axis in spec]
    shard = tuple(size // way for size, way in zip(array.shape, ways, strict=True))
    assert array.addressable_shards[0].data.shape == shard


def test_first_two_arguments_are_donated_and_no_other():
    trainer = trainer_of("default")
    trees = trainer.trainable, trainer.opt_state, trainer.frozen
    before = [jax.tree.leaves(tree) for tree in trees]
    trainer.step(tiny_models.batch())
    trainable, opt_state, frozen = before
    assert all(x.is_deleted() for x in [*trainable, *opt_state])
    assert not any(x.is_deleted() for x in frozen)


def test_randomness_is_a_function_of_seed_and_step_number():
    def losses(start, **options):
        trainer = Trainer(tiny_models.decoder(), optimizer=optax.sgd(0.0), noise=0.5, **options)
        trainer.done = start
        return [trainer.step(tiny_models.batch())["loss"] for _ in range(3)]

    from_0 = losses(0)
    assert len(set(from_0)) == 3
    assert losses(1)[:2] == from_0[1:]
    assert losses(0, seed=1)[0] != from_0[0]


def test_adafactor_and_a_bfloat16_anchor_on_a_mesh():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    optimizer = optax.adafactor(1e-2, min_dim_size_to_factor=4)
    trainer = Trainer(tiny_models.composed(dtype="bfloat16"), mesh, optimizer)
    losses = [trainer.step(tiny_models.batch())["loss"] for _ in range(5)]
    assert losses[-1] < losses[0]
    assert {x.dtype for x in jax.tree.leaves(trainer.trainable)} == {jnp.dtype("float32")}


def test_muon_steps_alike_on_a_mesh_and_on_one_device():
    section = decoder_run().optimizer
    section.update(name="muon", schedule="constant", learning_rate=1e-2)

    def losses(mesh):
        model = tiny_models.composed()
        projections = Parts(model).structure.projections()
        optimizer, _ = make_optimizer(section, 10, projections)
        trainer = Trainer(model, mesh, optimizer)
        return [trainer.step(tiny_models.batch())["loss"] for _ in range(5)]

    alone = losses(one_device())
    assert alone[-1] < alone[0]
    found = losses(sharding.make_mesh({"fsdp": 4, "tensor": 2}))
    np.testing.assert_allclose(found, alone, rtol=1e-4)


def test_a_width_that_the_mesh_does_not_divide_is_refused_by_name():
    model = tiny_models.composed(CompositionConfig(every=2, num_heads=4))
    with pytest.raises(CalmError, match=r"rounds/0/0/\w+: heads of size 4 .* tensor = 8"):
        Trainer(model, sharding.make_mesh({"tensor": 8}))


def test_shardings_name_every_argument():
    trainer = Trainer(tiny_models.composed(), sharding.make_mesh({"data": 2, "fsdp": 4}))
    for field in dataclasses.fields(Shardings):
        tree = getattr(trainer.shardings, field.name)
        assert all(isinstance(x, NamedSharding) for x in jax.tree.leaves(tree)), field.name
