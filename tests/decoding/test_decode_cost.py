"""A step of decoding as it is compiled, against the arithmetic that it cannot do without."""

import math
import re

import jax
import numpy as np
import pytest
from random_models import composed_structure, llama, palm, random_composed, random_tree

from calm_jax import sharding
from calm_jax.decoding import Generator, steps
from calm_jax.decoding.memory import bytes_per_row
from calm_jax.models import CompositionConfig
from calm_jax.models.cross_cache import CrossBytes
from calm_jax.models.parameters import size_in_bytes
from calm_jax.training.flops import matmul_flops

ROWS, SLOTS = 8, 256
V, D, E, H, N, K, F, LAYERS = 512, 256, 128, 64, 4, 2, 1024, 4
SIZES = {"vocab_size": V, "num_heads": N, "head_dim": H, "mlp_dim": F, "num_layers": LAYERS}
MODELS = (
    llama(**{**SIZES, "embed_dim": D, "num_kv_heads": K}),
    (palm(**{**SIZES, "embed_dim": E}),),
    (CompositionConfig(every=2),),
)


@pytest.fixture(autouse=True)
def optimised():
    """The programs that users run; tests compile without most optimisations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def ideal(latent: bool) -> int:
    """FLOPs of all products of one step; one head attends to SLOTS with 4 a feature."""

    def layer(width, key_heads):
        projections = 2 * width * (N + 2 * key_heads) * H + 2 * N * H * width
        return projections + 3 * 2 * width * F + 4 * SLOTS * N * H

    # Queries and output; f_proj is absorbed, so keys and values are products of E features. In the
    # latent form they are of queries and results instead, and attention is N heads of E features.
    bridge = 2 * 2 * D * D + 2 * 2 * E * D + 4 * SLOTS * (N * E if latent else D)
    head = 2 * D * V
    return ROWS * (LAYERS * (layer(D, K) + layer(E, 1)) + 2 * bridge + head)


def decoding_step(model, rows=ROWS):
    """A generator's scheduler, and a step of its program: as a function of arrays, and compiled."""
    scheduler = Generator(model, max_length=SLOTS, slots=rows).scheduler
    graphdef, weights, state = scheduler._static, scheduler._weights, scheduler._state
    arrays = (weights, state, scheduler._ends_E, np.int32(1), np.bool_(False))
    options = {"known": V, "reads": (SLOTS,), "most": 1, "top": 0}
    flops = matmul_flops(lambda *arrays: steps.decode(graphdef, *arrays, **options), *arrays)
    return scheduler, flops, steps.decode.lower(graphdef, *arrays, **options).compile()


@pytest.mark.parametrize("latent", [True, False])
def test_one_device_computes_and_moves_what_it_must(latent, monkeypatch):
    """On one CPU device layers run one by one, so that XLA counts each; and the loop once."""
    monkeypatch.setattr(CrossBytes, "is_latent", property(lambda self: latent))
    scheduler, flops, compiled = decoding_step(random_composed(*MODELS))
    assert flops == ideal(latent)
    cost = compiled.cost_analysis()
    assert 1 <= cost["flops"] / ideal(latent) <= 1.05
    caches = ROWS * bytes_per_row(scheduler._model, SLOTS)
    held = size_in_bytes(scheduler._weights) + caches
    # A CPU copies a layer's slots out of the cache before it multiplies, and reads latents for
    # queries and for results; weights are read once.
    assert 1 <= cost["bytes accessed"] / held <= 3


def made_as_large_as_caches(scheduler, compiled) -> set[str]:
    """The kinds of operations whose results have the shape of a device's part of a cache."""
    kept = {
        tuple(sorted(x.sharding.shard_shape(x.shape)))
        for x in jax.tree.leaves(scheduler._state.cache)
        if x.ndim == 5
    }
    made = re.findall(r"= f32\[([\d,]+)\]\S* (\w[\w-]*)\(", compiled.as_text())
    return {kind for shape, kind in made if tuple(sorted(map(int, shape.split(",")))) in kept}


@pytest.mark.parametrize("rows", [4, ROWS])
def test_no_cache_is_copied(rows):
    """In a loop over layers, on a mesh: what is written is the new token alone, in place."""
    structure = composed_structure(*MODELS)
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    tree = jax.device_put(random_tree(structure, 0), structure.shardings(mesh))
    scheduler, flops, compiled = decoding_step(structure.merge(tree), rows)
    assert flops * ROWS == ideal(latent=True) * rows
    made = made_as_large_as_caches(scheduler, compiled)
    assert {"scatter", "dynamic-update-slice"} & made
    assert not {"copy", "transpose", "all-gather", "dynamic-slice"} & made


@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_no_cache_is_copied_on_one_device(rows, latent, monkeypatch):
    """Layers run one by one and read all slots."""
    monkeypatch.setattr(CrossBytes, "is_latent", property(lambda self: latent))
    scheduler, _, compiled = decoding_step(random_composed(*MODELS), rows)
    made = made_as_large_as_caches(scheduler, compiled)
    assert {"scatter", "dynamic-update-slice"} & made
    assert not {"copy", "transpose"} & made


def test_no_weight_is_transposed():
    """A product that sums over axes in another order than the weight's copies it at every step."""
    scheduler, _, compiled = decoding_step(random_composed(*MODELS))
    sizes = {x.size for x in jax.tree.leaves(scheduler._weights)}
    # Those with heads; none of them is as large as the part of a cache that a layer reads.
    with_heads = {D * N * H, E * N * H, D * K * H}
    assert with_heads <= sizes
    made = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", compiled.as_text())
    assert not with_heads & {math.prod(map(int, shape.split(","))) for shape in made}
