import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from flax import traverse_util

from calm_jax import sharding
from calm_jax.errors import CalmError
from calm_jax.models.parameters import path_name
from calm_jax.models.parts import Parts
from calm_jax.training.configuration import decoder_run
from calm_jax.training.optimizer import make_optimizer, make_schedule
from calm_jax.training.step import Shardings

# How many axes the products of each matrix of a bridge sum over, and how many they do not.
AXES = {"projection": (1, 1), "query": (1, 2), "key": (1, 2), "value": (1, 2), "output": (2, 1)}


def config(**values):
    section = decoder_run().optimizer
    section.update(values)
    return section


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_learning_rate_follows_its_formula(schedule, warmup):
    section = config(schedule=schedule, learning_rate=0.5, warmup_steps=warmup, final_fraction=0.2)
    rate = make_schedule(section, 20)
    for step in range(21):
        done = (step - warmup) / (20 - warmup)
        if step < warmup:  # a straight line to the peak, which does not start at 0
            expected = (1 + step) / (warmup + 1)
        elif schedule == "linear":
            expected = 1.0 - 0.8 * done
        elif schedule == "cosine":
            expected = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * done))
        else:
            expected = 1.0
        assert float(rate(step)) == pytest.approx(0.5 * expected, rel=1e-5), step


def numpy_adamw(parameters, gradients, *, rate, b1, b2, decay, clip, decayed):
    """AdamW (Loshchilov and Hutter 2019) after clipping by the global norm."""
    first = {key: np.zeros_like(value) for key, value in parameters.items()}
    second = {key: np.zeros_like(value) for key, value in parameters.items()}
    for step, gradient in enumerate(gradients, start=1):
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
        for key, g in gradient.items():
            g = g * min(1.0, clip / norm)
            first[key] = b1 * first[key] + (1 - b1) * g
            second[key] = b2 * second[key] + (1 - b2) * g**2
            update = (first[key] / (1 - b1**step)) / (np.sqrt(second[key] / (1 - b2**step)) + 1e-8)
            if key in decayed:
                update = update + decay * parameters[key]
            parameters[key] = parameters[key] - rate * update
    return parameters


def test_adamw_is_its_formula_and_decays_matrices_alone():
    shapes = {
        "output": (2, 3, 4),
        "gate": (3, 4),  # of an MLP
        "head_bias": (5,),
        "norm_scale": (2, 4),  # of two stacked layers
        "query_norm": (2, 4),
        "query_bias": (2, 3, 4),
        "bridge_gate": (),
    }
    draw = np.random.default_rng(0)
    parameters = {key: draw.normal(size=shape).astype("f4") for key, shape in shapes.items()}
    gradients = [
        {key: draw.normal(size=shape).astype("f4") for key, shape in shapes.items()}
        for _ in range(3)
    ]
    section = config(
        schedule="constant", learning_rate=0.1, b1=0.8, b2=0.95, weight_decay=0.3, clip_norm=2.0
    )
    optimizer, _ = make_optimizer(section, 100, {})
    found = jax.tree.map(jnp.asarray, parameters)
    state = optimizer.init(found)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, found)
        found = optax.apply_updates(found, updates)
    expected = numpy_adamw(
        parameters, gradients, rate=0.1, b1=0.8, b2=0.95, decay=0.3, clip=2.0,
        decayed={"output", "gate"},
    )  # fmt: skip
    for key in shapes:
        np.testing.assert_allclose(found[key], expected[key], rtol=2e-5, err_msg=key)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert moments and all(leaf.dtype == jnp.float32 for leaf in moments)


def test_adafactor_moves_what_starts_at_zero_by_the_learning_rate():
    parameters = {"output": jnp.zeros((4, 256, 256)), "gate": jnp.zeros(())}
    draw = np.random.default_rng(0)
    # A gradient of rank one, whose factored second moment is exact.
    row, column = np.exp(draw.normal(size=(4, 256, 1))), np.exp(draw.normal(size=(4, 1, 256)))
    gradient = {"output": jnp.asarray(-row * column, jnp.float32), "gate": jnp.float32(3.0)}
    section = config(name="adafactor", schedule="constant", learning_rate=0.01, clip_norm=0.0)
    optimizer, _ = make_optimizer(section, 100, {})
    state = optimizer.init(parameters)
    updates, _ = optimizer.update(gradient, state, parameters)
    np.testing.assert_allclose(updates["output"], 0.01, rtol=1e-4)
    np.testing.assert_allclose(updates["gate"], -0.01, rtol=1e-4)
    size = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert size < 4 * 2 * 256 + 20  # a row and a column, not a matrix


def layers_of(path: str, x: np.ndarray) -> np.ndarray | None:
    """A bridge's matrix [layers, rows, columns] as its product takes it; None for all else."""
    if (name := path.rpartition("/")[2]) not in AXES:
        return None
    summed, others = AXES[name]
    sizes = (x.shape[-summed - others : -others], x.shape[-others:])
    return np.reshape(x, (-1, *map(math.prod, sizes)))


def test_muon_steps_along_every_direction_of_a_matrix_alike():
    """And as Adam does along the signs of all other parameters, on the first step."""
    parts = Parts(tiny_models.composed())
    parameters, _ = parts.of(tiny_models.composed())
    draw = np.random.default_rng(0)

    def drawn(path, x):
        gradient = draw.normal(size=x.shape).astype("f4")
        layers = layers_of(path_name(path), gradient)
        if layers is None:
            return gradient
        left, sizes, right = np.linalg.svd(layers, full_matrices=False)
        known = np.linspace(1.0, 0.3, sizes.shape[-1], dtype="f4")  # a gradient of full rank
        return np.reshape(left * known @ right, x.shape)

    gradients = jax.tree.map_with_path(drawn, parameters)
    section = config(name="muon", schedule="constant", learning_rate=0.01, clip_norm=0.0)
    optimizer, _ = make_optimizer(section, 100, parts.structure.projections())
    updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
    found = traverse_util.flatten_dict(updates, sep="/")
    for path, gradient in traverse_util.flatten_dict(gradients, sep="/").items():
        layers = layers_of(path, gradient)
        if layers is None:
            np.testing.assert_allclose(found[path], -0.01 * np.sign(gradient), rtol=1e-3)
            continue
        for layer, moved in zip(layers, layers_of(path, found[path]), strict=True):
            left, _, right = np.linalg.svd(layer, full_matrices=False)
            along = -left.T @ moved @ right.T / (0.01 * 0.2 * math.sqrt(max(layer.shape)))
            steps = np.diag(along)
            assert np.abs(along - np.diag(steps)).max() < 1e-3, path
            assert steps.min() > 0.6 and steps.max() < 1.3, path


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_the_optimizers_state_finds_its_shardings(name):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    parts = Parts(tiny_models.composed())
    section = config(name=name, weight_decay=0.1)
    optimizer, _ = make_optimizer(section, 10, parts.structure.projections())
    shardings = Shardings.of(parts, optimizer, mesh)
    abstract, _ = parts.split(parts.structure.abstract())
    jax.jit(optimizer.init, out_shardings=shardings.opt_state).lower(abstract).compile()


@pytest.mark.parametrize("key", ["name", "schedule"])
def test_unknown_names_are_refused(key):
    with pytest.raises(CalmError, match=f"optimizer.{key} 'other'"):
        make_optimizer(config(**{key: "other"}), 10, {})
