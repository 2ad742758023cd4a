"""What fits: bytes of one chip, and the check before a run's first step."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from calm_jax.planning import memory, topologies


def device(kind, platform="tpu", limit=None):
    stats = None if limit is None else {"bytes_limit": limit}
    return types.SimpleNamespace(platform=platform, device_kind=kind, memory_stats=lambda: stats)


def test_bytes_of_one_chip_are_those_of_a_shard():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    places = {
        "split": NamedSharding(mesh, PartitionSpec("a", "b")),
        "rows": NamedSharding(mesh, PartitionSpec(("a", "b"))),
        "whole": NamedSharding(mesh, PartitionSpec()),
    }
    tree = {
        name: jax.device_put(jnp.zeros((16, 6), dtype), places[name])
        for name, dtype in (("split", jnp.float32), ("rows", jnp.bfloat16), ("whole", jnp.int8))
    }
    held = sum(array.addressable_shards[3].data.nbytes for array in tree.values())
    assert memory.bytes_of_one_chip(tree, places) == held


@pytest.mark.parametrize(
    "where, available",
    [
        (device("TPU v5 lite"), topologies.CHIPS["v5e"].hbm_bytes),
        (device("TPU v5 lite", limit=10_000), 10_000),
        (device("NVIDIA H200", "gpu", limit=2**37), 2**37),
    ],
)
def test_a_step_that_is_too_large_is_told(where, available):
    assert memory.does_not_fit(available, where) is None
    said = memory.does_not_fit(available + 2**30, where)
    assert f"{(available + 2**30) / 2**30:.1f} GiB a device" in said
    assert f"{where.device_kind} has {available / 2**30:.1f} GiB" in said
    assert "train.accumulate" in said and "\n" not in said


def test_nothing_is_said_of_devices_whose_memory_is_unknown():
    assert memory.does_not_fit(2**60, jax.devices()[0]) is None
    assert memory.does_not_fit(2**60, device("TPU v99")) is None
