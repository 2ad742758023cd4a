"""Two processes that decode over one mesh answer as one process does."""

import pytest
from child_processes import ends, free_address, start

PROGRAM = """
import sys

import jax

address, index = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, 2, index)

import numpy as np
import tiny_models

from calm_jax import sharding
from calm_jax.decoding import Generator, Sampling
from calm_jax.models import CompositionConfig
from calm_jax.models.parameters import Structure, module_tree

model = tiny_models.randomised(tiny_models.composed(CompositionConfig(every=2, num_heads=4)))
structure = Structure(model)
random = np.random.default_rng(0)
prompts = [random.integers(1, 30, random.integers(1, 40)).tolist() for _ in range(6)]
sampling = Sampling(max_new_tokens=6)
options = {"max_length": 64, "slots": 4, "prefill_chunk": 32}
alone = Generator(model, **options).generate(prompts, sampling)
for shape, draft in (({"data": 2, "tensor": 2}, 0), ({"tensor": 4}, 2)):
    spread = structure.merge(
        jax.tree.map(
            lambda x, place: jax.make_array_from_callback(x.shape, place, lambda index: x[index]),
            jax.tree.map(np.asarray, module_tree(model)),
            structure.shardings(sharding.make_mesh(shape)),
        )
    )
    found = Generator(spread, **options, draft=draft).generate(prompts, sampling)
    assert [a.tokens for (a,) in found] == [a.tokens for (a,) in alone], shape
print("equal")
"""


@pytest.mark.slow
def test_two_processes_answer_as_one():
    address = free_address()
    both = [start("-c", PROGRAM, address, str(index), devices=2) for index in range(2)]
    statuses, outputs = ends(both)
    assert statuses == [0, 0], outputs
    assert all(output.strip().endswith("equal") for output in outputs)
