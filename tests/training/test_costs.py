"""Rows of a run's trees: parameters, bytes and FLOPs, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_models
from flax import nnx

from calm_jax import sharding
from calm_jax.models import CompositionConfig
from calm_jax.models.execution import Execution
from calm_jax.models.parts import Parts
from calm_jax.training.costs import shard_bytes, tree_costs

T, V = 32, tiny_models.VOCAB


def decoder_flops(layers, D, N, K, H, F, *, gated=True, head=True):
    """Forward FLOPs a token, from the shapes of the papers."""
    attention = 2 * D * (N + 2 * K) * H + 2 * N * H * D + 2 * 2 * T * N * H
    mlp = 2 * (3 if gated else 2) * D * F
    return layers * (attention + mlp) + (2 * D * V if head else 0)


def costs_of(model):
    parts = Parts(model)
    trainable, frozen = parts.of(model)
    opt_state = optax.adam(1e-3).init(trainable)
    return {row["name"]: row for row in tree_costs(parts, trainable, opt_state, frozen)}


def test_a_lone_decoder():
    rows = costs_of(tiny_models.decoder(family="llama"))
    D, N, K, H, F, L = 32, 8, 2, 4, 32, 4
    layer = D * N * H + 2 * D * K * H + N * H * D + 3 * D * F + 2 * D
    parameters = V * D + L * layer + D + D * V
    assert rows.keys() == {"decoder", "optimizer"}
    assert rows["decoder"] == {
        "name": "decoder",
        "parameters": parameters,
        "bytes": 4 * parameters,
        "trained": True,
        "flops_per_token": decoder_flops(L, D, N, K, H, F),
    }
    assert rows["optimizer"]["parameters"] == 2 * parameters + 1  # two moments and a count
    assert rows["optimizer"]["bytes"] == 4 * (2 * parameters + 1)


def test_a_kernel_for_long_rows_changes_no_cost():
    """Costs are those of a row that is shorter than Splash attention takes."""
    model = tiny_models.decoder(family="llama")
    expected = costs_of(model)
    model.execution = Execution("splash")
    assert costs_of(model) == expected


def test_a_composed_model():
    """The augment runs up to its last tap, layer 1, and has no head."""
    config = CompositionConfig(connections=((0, 1), (1, 3)), num_heads=4, head_dim=6)
    rows = costs_of(tiny_models.composed(config))
    D, E, N, H, connections = 32, 16, 4, 6, 2
    assert list(rows) == ["anchor", "augment 0", "bridge", "optimizer"]
    matrices = E * D + 4 * D * N * H
    assert rows["bridge"]["parameters"] == connections * (matrices + D + E)
    per_connection = 2 * matrices + 2 * 2 * T * N * H
    np.testing.assert_allclose(rows["bridge"]["flops_per_token"], connections * per_connection)
    assert rows["anchor"]["flops_per_token"] == decoder_flops(4, 32, 8, 2, 4, 32)
    assert rows["augment 0"]["flops_per_token"] == decoder_flops(2, 16, 8, 1, 4, 32, head=False)
    assert rows["anchor"]["parameters"] == sum(
        x.size for x in jax.tree.leaves(nnx.state(tiny_models.decoder(1, "llama")))
    )
    trained = {name: row["trained"] for name, row in rows.items()}
    assert trained == {"anchor": False, "augment 0": False, "bridge": True, "optimizer": False}


def test_bytes_on_one_device_are_those_of_a_shard():
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    shardings = {
        name: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for name, axes in (
            ("split", ("data", "tensor")),
            ("rows", (("data", "tensor"),)),
            ("whole", ()),
        )
    }
    tree = {
        name: jax.device_put(jnp.zeros((16, 6), dtype), shardings[name])
        for name, dtype in (("split", jnp.float32), ("rows", jnp.bfloat16), ("whole", jnp.int8))
    }
    held = sum(array.addressable_shards[3].data.nbytes for array in tree.values())
    assert shard_bytes(tree, shardings) == held
