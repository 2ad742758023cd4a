"""Meshes and sharding rules, and that a sharded composed model computes what one device does."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import some_slow
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from random_models import (
    assert_close,
    composed_structure,
    decoder_structure,
    llama,
    palm,
    random_decoder,
    random_tree,
)

from calm_jax import sharding
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Inputs, compose
from calm_jax.models.parameters import Structure, module_tree, path_name

# Every dimension that a mesh axis may split divides by 8, except the key heads.
WIDE = {"vocab_size": 32, "num_heads": 8, "head_dim": 4, "mlp_dim": 24}
ANCHOR = llama(num_layers=4, embed_dim=16, num_kv_heads=2, **WIDE)
AUGMENT = palm(num_layers=3, embed_dim=8, **WIDE)
CONFIG = CompositionConfig(every=1, init="paper", rotary=True, bias=True)
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": -1},
    "tensor": {"tensor": 8},
    "all": {"data": 2, "fsdp": -1, "tensor": 2},
    "slices": {"slices": 2, "data": 2, "tensor": -1},
}


def run(mesh):
    """Logits and gradients of the bridge, with every argument placed by the rules."""
    structure = composed_structure(ANCHOR, (AUGMENT,), (CONFIG,))
    shardings = structure.shardings(mesh)
    random = np.random.default_rng(1)
    batch = {
        "tokens": random.integers(32, size=(8, 6)).astype(np.int32),
        "segments": np.repeat(np.array([[1] * 3 + [2] * 2 + [0]], np.int32), 8, axis=0),
    }

    def step(tree, batch):
        def loss(bridge):
            model = structure.merge({**tree, "bridge": bridge})
            logits = model.forward(Inputs(batch["tokens"], segments_BT=batch["segments"]))
            return jnp.sum(jnp.sin(logits)), logits

        return jax.grad(loss, has_aux=True)(tree["bridge"])

    batch_shardings = dict.fromkeys(batch, sharding.batch_sharding(mesh))
    tree = jax.device_put(random_tree(structure, 0), shardings)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, in_shardings=(shardings, batch_shardings))
        gradients, logits = compiled(tree, sharding.put_batch(batch, mesh))
    return tree, gradients, logits


@pytest.fixture(scope="module")
def on_one_device():
    return run(sharding.make_mesh({"data": 1}, jax.devices()[:1]))


@pytest.mark.parametrize(
    "name",
    # Those of one axis are parts of "all" and "slices"; 8 devices that share 2 key heads are not.
    some_slow(MESHES, ("data", "fsdp")),
)
def test_eight_devices_compute_what_one_does(name, on_one_device):
    mesh = sharding.make_mesh(MESHES[name])
    tree, gradients, logits = run(mesh)
    _, one_gradients, one_logits = on_one_device
    assert_close(logits, one_logits)
    jax.tree.map(assert_close, gradients, one_gradients)
    batch = NamedSharding(mesh, PartitionSpec(("slices", "data", "fsdp"), None, "tensor"))
    assert logits.sharding.is_equivalent_to(batch, 3)

    # What each device holds, by hand.
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    keys = 2 // tensor if tensor <= 2 else 2
    held = {
        "anchor/embedding": (32 // tensor, 16 // fsdp),
        "anchor/head": (16 // fsdp, 32 // tensor),
        "anchor/layers/attention/query": (4, 16 // fsdp, 8 // tensor, 4),
        "anchor/layers/attention/key": (4, 16 // fsdp, keys, 4),
        "anchor/layers/mlp/down": (4, 24 // tensor, 16 // fsdp),
        "augments/0/layers/attention/value": (3, 8 // fsdp, 1, 4),
        "bridge/rounds/0/0/projection": (2, 8 // tensor, 16 // fsdp),
        "bridge/rounds/0/0/query": (2, 16 // fsdp, 8 // tensor, 2),
        "bridge/rounds/1/0/output": (8 // tensor, 2, 16 // fsdp),
        "bridge/rounds/1/0/tap_norm": (8 // tensor,),
    }
    arrays = {path_name(path): x for path, x in jax.tree.leaves_with_path(tree)}
    for path, shape in held.items():
        assert arrays[path].sharding.mesh == mesh
        assert arrays[path].sharding.shard_shape(arrays[path].shape) == shape, path
        assert {shard.data.shape for shard in arrays[path].addressable_shards} == {shape}, path


def test_composing_on_a_mesh_keeps_every_array_on_it():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    models = []
    for config in (ANCHOR, AUGMENT):
        structure = Structure(random_decoder(config))
        tree = jax.device_put(random_tree(structure, 0), structure.shardings(mesh))
        models.append(structure.merge(tree))
    composed = compose(*models, CONFIG, rngs=nnx.Rngs(0))
    wanted = composed_structure(ANCHOR, (AUGMENT,), (CONFIG,)).shardings(mesh)

    def check(array, expected):
        assert array.sharding.mesh == mesh
        assert array.sharding.is_equivalent_to(expected, array.ndim)

    jax.tree.map(check, module_tree(composed), wanted)


def test_init_sharded_creates_each_array_with_its_sharding():
    mesh = sharding.make_mesh({"fsdp": 8})
    expected = sharding.array_sharding("w", (16, 4), ("embed", "mlp"), mesh)
    array = sharding.init_sharded(lambda: jnp.arange(64.0).reshape(16, 4), expected)
    assert array.sharding == expected
    assert array.addressable_shards[3].data.shape == (2, 4)
    np.testing.assert_array_equal(array, np.arange(64.0).reshape(16, 4))


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ({}, None),
        ({"data": -1}, (1, 8, 1, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (1, 2, 2, 2)),
        ({"tensor": -1, "data": 8}, (1, 8, 1, 1)),
        ({"slices": 2, "data": -1, "tensor": 2}, (2, 2, 1, 2)),
        ({"slices": 0, "fsdp": -1}, (1, 1, 8, 1)),
    ],
)
def test_mesh(shape, sizes):
    devices = jax.devices()[:1] if sizes is None else None
    mesh = sharding.make_mesh(shape, devices)
    assert mesh.axis_names == ("slices", "data", "fsdp", "tensor")
    assert mesh.devices.shape == (sizes or (1, 1, 1, 1))
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model": 2}, "mesh.model is not a mesh axis; known are"),
        ({"data": 0}, "mesh.data is 0; it must be at least 1, or -1"),
        ({"data": -2}, "mesh.data is -2"),
        ({"data": -1, "fsdp": -1}, "has -1 for more than one axis"),
        (
            {"tensor": 4, "fsdp": 4},
            "mesh slices 1 × data 1 × fsdp 4 × tensor 4 needs 16 devices, but there are 8$",
        ),
        (
            {"data": 3, "fsdp": -1},
            "mesh slices 1 × data 3 × fsdp -1 × tensor 1: the 8 devices are not divisible by 3$",
        ),
        ({"data": 2, "tensor": 2}, "× tensor 2 uses 4 of the 8 devices; all must be used$"),
    ],
)
def test_mesh_refused(shape, message):
    with pytest.raises(CalmError, match=message):
        sharding.make_mesh(shape)


def test_one_device_is_one():
    with pytest.raises(CalmError, match=r"needs 2 devices, but there is 1$"):
        sharding.make_mesh({"data": 2}, jax.devices()[:1])


@pytest.mark.parametrize("slices", [2, -1])
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_mesh_has_the_slices_that_its_devices_are_of(slices, platform):
    devices = [types.SimpleNamespace(platform=platform, slice_index=0) for _ in range(2)]
    with pytest.raises(CalmError, match=r"mesh\.slices is 2, but the devices form 1"):
        sharding.make_mesh({"slices": slices}, devices)
    devices[1].slice_index = 1
    with pytest.raises(CalmError, match=r"mesh\.slices is 1, but the devices form 2"):
        sharding.make_mesh({"slices": 1, "data": 2}, devices)


def test_rules_split_logical_axes():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert sharding.batch_sharding(mesh).spec == PartitionSpec(("slices", "data", "fsdp"), None)
    plain = sharding.array_sharding("w", (8, 8, 8), ("embed", "heads", None), mesh)
    assert plain.spec == PartitionSpec("fsdp", "tensor", None)
    everywhere = sharding.WEIGHT_RULES["all"]
    split = sharding.array_sharding("w", (8, 8), ("embed", "mlp"), mesh, everywhere)
    assert split.spec == PartitionSpec(("data", "fsdp"), "tensor")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("embed", "expert"), "no sharding rule for the logical axis 'expert'; known are"),
        (("embed", "embed"), "use the mesh axis 'fsdp' twice"),
        (("batch", "embed"), "use the mesh axis 'fsdp' twice"),
        (("heads", "mlp"), "use the mesh axis 'tensor' twice"),
    ],
)
def test_axes_without_a_sharding_are_refused(axes, message):
    with pytest.raises(CalmError, match=message):
        sharding.array_sharding("w", (8, 8), axes, sharding.make_mesh({"fsdp": 8}))


def test_array_sharding():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})

    def spec(shape, axes):
        return sharding.array_sharding("w", shape, axes, mesh).spec

    stacked = (3, 2, 8, 4, 5)  # two leading axes of stacked layers
    assert spec(stacked, ("embed", "heads", "head_dim")) == PartitionSpec(
        None, None, "fsdp", "tensor", None
    )
    assert spec((8, 1, 5), ("embed", "kv_heads", "head_dim")) == PartitionSpec("fsdp", None, None)
    assert spec((8, 6, 5), ("embed", "kv_heads", "head_dim")) == PartitionSpec(
        "fsdp", "tensor", None
    )


def test_an_array_that_does_not_divide_is_named():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    with pytest.raises(CalmError, match=r"w: embed of size 6 is not divisible .* fsdp = 4"):
        sharding.array_sharding("w", (6, 2), ("embed", "mlp"), mesh)
    structure = decoder_structure(palm(num_heads=3, embed_dim=8))
    where = "layers/attention/output: heads of size 3 .* tensor = 2"
    with pytest.raises(CalmError, match=where):
        structure.shardings(mesh)


def test_every_logical_axis_of_every_model_has_a_rule():
    everything = llama(
        attention_bias=True, output_bias=True, mlp_bias=True, norm_bias=True, head_bias=True,
        qk_norm="rms", post_norms=True,
    )  # fmt: skip
    config = CompositionConfig(every=1, bias=True, gate=True)
    structure = composed_structure(everything, (palm(qk_norm="l2"),), (config,))
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    batch_shardings = structure.shardings(mesh)
    assert jax.tree.structure(batch_shardings) == jax.tree.structure(structure.abstract())


def test_batch_divides_by_the_mesh():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharding.check_batch(8, 2, mesh)
    message = r"batch_size 12 is not divisible by 8 \(slices 1 × data 2 × fsdp 2 × acc"
    with pytest.raises(CalmError, match=message):
        sharding.check_batch(12, 2, mesh)


def test_constrain_without_a_mesh_is_the_array_itself():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, "batch", "length") is x
