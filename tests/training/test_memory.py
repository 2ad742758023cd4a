"""Bytes of trees on one chip."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from calm_jax.training import memory


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
