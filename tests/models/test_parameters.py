"""Modules as trees, trees compared, and the sizes of published models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import composed_structure, llama, palm, random_composed, random_decoder

from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Decoder, DecoderConfig
from calm_jax.models.parameters import (
    Structure,
    check_same_tree,
    count,
    module_tree,
    path_name,
    size_in_bytes,
)


def paths(tree):
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def test_a_module_becomes_a_tree_and_comes_back():
    composed = random_composed(palm(num_layers=7), (llama(),), CompositionConfig(every=1))
    structure, tree = Structure(composed), module_tree(composed)
    assert tree.keys() == {"anchor", "augments", "bridge"}
    names = paths(tree)
    assert "anchor/layers/attention/query" in names
    assert "augments/0/embedding" in names
    assert "bridge/rounds/0/0/projection" in names
    again = structure.merge(tree)
    assert again.configs == composed.configs
    assert again.plan == composed.plan
    for name, leaf in paths(module_tree(again)).items():
        assert leaf is names[name]  # nothing was copied, there or back


def test_the_structure_holds_shapes_and_axes_alone():
    structure = Structure(random_decoder(palm(embed_dim=12, num_layers=5)))
    abstract = paths(structure.abstract())
    axes = {
        "/".join(path): variable.get_metadata("axes")
        for path, variable in structure.variables().items()
    }
    assert abstract.keys() == axes.keys()
    query = "layers/attention/query"
    assert abstract[query] == jax.ShapeDtypeStruct((5, 12, 4, 8), jnp.float32)
    assert axes[query] == ("embed", "heads", "head_dim")
    for name, x in abstract.items():
        stacked = 1 if name.startswith("layers") else 0
        assert len(axes[name]) == len(x.shape) - stacked


def test_merging_leaves_the_structure_as_it_was():
    model = random_decoder(palm())
    structure = Structure(model)
    before = structure.abstract()
    structure.merge(jax.tree.map(lambda x: x + 1, module_tree(model)))
    assert structure.abstract() == before


def shaped(**shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (shaped(a=(2,)), "runs/x: w/b is missing"),
        (shaped(a=(2,), b=(3, 4), c=()), "runs/x: w/c is not part of the model"),
        (
            shaped(a=(2,), b=(4, 3)),
            r"runs/x: w/b has shape \(4, 3\), the model needs \(3, 4\)",
        ),
    ],
)
def test_trees_that_differ(found, message):
    expected = {"w": shaped(a=(2,), b=(3, 4))}
    check_same_tree(expected, {"w": shaped(b=(3, 4), a=(2,))}, "runs/x")
    with pytest.raises(CalmError, match=message):
        check_same_tree(expected, {"w": found}, "runs/x")


def test_count_and_size():
    tree = {"a": np.zeros((3, 4), np.float32), "b": [jax.ShapeDtypeStruct((5,), jnp.bfloat16)]}
    assert count(tree) == 17
    packed = {"w": jnp.zeros((3, 5), jnp.uint8), "w_scale": jnp.zeros((3, 1), jnp.float16)}
    assert count({**tree, **packed}) == 17 + 2 * 15
    assert size_in_bytes(tree) == 12 * 4 + 5 * 2


def parameters(config):
    return count(Structure(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))).abstract())


@pytest.mark.parametrize(
    ("layers", "width", "heads", "total"),
    [
        (32, 4096, 16, 8_632_532_992),
        (64, 8192, 32, 62_496_702_464),
        (118, 18432, 48, 540_358_815_744),
    ],
    ids=["8B", "62B", "540B"],
)
def test_palm_has_its_published_size(layers, width, heads, total):
    config = DecoderConfig.palm(
        vocab_size=256_128, embed_dim=width, num_layers=layers, num_heads=heads, head_dim=256,
        mlp_dim=4 * width,
    )  # fmt: skip
    assert parameters(config) == total + width  # the totals leave out the final norm


def test_gemma_2_27b():
    config = DecoderConfig.gemma(
        vocab_size=256_000, embed_dim=4608, num_layers=46, num_heads=32, num_kv_heads=16,
        head_dim=128, mlp_dim=36864, post_norms=True, window=4096, window_pattern=(True, False),
    )  # fmt: skip
    attention = 4608 * 128 * (32 + 16 + 16 + 32)
    layer = attention + 3 * 4608 * 36864 + 4 * 4608
    assert parameters(config) == 46 * layer + 256_000 * 4608 + 4608 == 27_227_128_320


def test_llama_3_8b():
    config = DecoderConfig.llama(
        vocab_size=128_256, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8,
        head_dim=128, mlp_dim=14336,
    )  # fmt: skip
    assert parameters(config) == 8_030_261_248


@pytest.mark.parametrize("output_projection", [False, True])
def test_the_papers_count_of_a_bridge(output_projection):
    """BERT-small to BERT-large: n (D_A D_B + 3 D_B^2) = 14,680,064, to which W_O adds n D_B^2."""
    sizes = {"vocab_size": 30_000, "head_dim": 64, "mlp_dim": 64}
    structure = composed_structure(
        DecoderConfig.palm(embed_dim=1024, num_layers=24, num_heads=16, **sizes),
        (DecoderConfig.palm(embed_dim=512, num_layers=4, num_heads=8, **sizes),),
        (CompositionConfig.paper(every=1, output_projection=output_projection),),
    )
    bridge = structure.abstract()["bridge"]
    assert count(bridge) == 14_680_064 + output_projection * 4 * 1024**2
