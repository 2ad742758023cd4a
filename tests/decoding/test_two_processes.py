"""Two processes that decode over one mesh answer as one process does."""

import pathlib
import socket
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parents[1]

PROGRAM = """
import sys

import jax

address, index = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
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
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(index)],
            cwd=TESTS,
            env={"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "PATH": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in both:
        output, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-3000:]
        assert output.strip().endswith("equal")
