"""int8 weights: what they stand for, how near they are, where they live and what they cost."""

import dataclasses
import functools
import json

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import numpy_calm
import pytest
import quantized_models
import tiny_models
from flax import nnx
from jax.sharding import PartitionSpec
from quantized_models import DECODERS, KEPT, flat, float_twin, nested, rms, stood_for
from random_models import (
    as_inputs,
    assert_close,
    decoder_structure,
    llama,
    packed_batch,
    palm,
    random_decoder,
)

from calm_jax import sharding
from calm_jax.decoding import generate
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Decoder, DecoderConfig, compose
from calm_jax.models.parameters import (
    Structure,
    check_same_tree,
    module_tree,
    path_name,
    size_in_bytes,
)
from calm_jax.models.quantized import quantize, quantized_leaves


def int8(config):
    return dataclasses.replace(config, weights="int8")


def numpy_quantized(path, weight):
    """(q, s) of one array of a decoder as numpy has them; None for what is no matrix."""
    name = path.split("/")[-1]
    if name == "embedding":
        summed = (1,)
    elif name in KEPT:
        stacked = {"layers": 1}.get(path.split("/")[0], 0)
        summed = tuple(range(stacked, weight.ndim - KEPT[name]))
    else:
        return None
    scale = np.max(np.abs(weight), axis=summed, keepdims=True) / np.float32(127)
    return np.rint(weight / scale).astype(np.int8), np.squeeze(scale, summed)


quantized = functools.partial(quantized_models.quantized, kind="int8")


@pytest.mark.parametrize("family", DECODERS)
def test_logits_are_those_of_the_weights_it_stands_for(family):
    model = quantized(random_decoder(DECODERS[family]))
    tree, batch = stood_for(module_tree(model)), packed_batch()[:3]
    found = model(as_inputs(*batch))
    assert found.dtype == np.float32
    assert_close(found, numpy_calm.decoder_logits(model.config, tree, *batch))


@pytest.mark.parametrize("family", ["palm", "llama", "gemma 3", "gpt-j"])
def test_logits_are_near_those_of_the_float_weights(family):
    """Errors uniform in ± s/2 are 0.6 % of a normal weight here; three layers add them up."""
    config = dataclasses.replace(DECODERS[family], embed_dim=128, head_dim=32, mlp_dim=256)
    structure = decoder_structure(config)
    original = structure.merge(jax.jit(lambda: module_tree(Decoder(config, nnx.Rngs(0))))())
    model = quantized(original)
    tokens = packed_batch()[0]
    expected, found = np.asarray(original(tokens)), np.asarray(model(tokens))
    assert 0.002 < rms(found - expected) / rms(expected) <= 0.03
    bfloat16 = decoder_structure(dataclasses.replace(model.config, dtype="bfloat16"))
    rounded = bfloat16.merge(module_tree(model))(tokens)
    assert rms(rounded - found) <= 0.02 * rms(found)


@pytest.mark.parametrize("family", DECODERS)
def test_every_matrix_and_nothing_else_is_quantized(family):
    original = random_decoder(DECODERS[family])
    before, after = flat(module_tree(original)), flat(module_tree(quantized(original)))
    for path, weight in before.items():
        expected = numpy_quantized(path, np.asarray(weight))
        if expected is None:
            assert after.pop(path) is weight
        else:
            values, scale = after.pop(path), after.pop(f"{path}_scale")
            assert (values.dtype, scale.dtype) == (np.int8, np.float32)
            np.testing.assert_array_equal(values, expected[0])
            np.testing.assert_allclose(scale, expected[1], rtol=1e-6)
    assert not after


def test_a_random_decoder_is_the_quantized_one_of_its_seed():
    config = llama(attention_bias=True)
    found = module_tree(Decoder(int8(config), nnx.Rngs(3)))
    expected = module_tree(quantized(Decoder(config, nnx.Rngs(3))))
    structure = decoder_structure(int8(config))
    check_same_tree(structure.abstract(), found, "random")
    assert jax.tree.map(lambda x: x.dtype, structure.abstract()) == jax.tree.map(
        lambda x: x.dtype, found
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("apart", [False, True])
def test_leaves_of_stacked_layers(apart):
    """A stack comes whole, or as an iterator of its layers."""
    whole = random_decoder(llama())
    expected = quantized(random_decoder(llama()))
    structure = Structure(expected)
    mesh = sharding.make_mesh({"tensor": 2}, jax.devices()[:2])
    leaves = flat(module_tree(whole))
    if apart:
        layers = [path for path in Structure(whole).summed() if path.startswith("layers/")]
        leaves |= {path: iter(leaves[path]) for path in layers}
    leaves = quantized_leaves(leaves.items(), Structure(whole), structure.shardings(mesh), "int8")
    found = nested(dict(leaves))
    jax.tree.map(np.testing.assert_array_equal, found, module_tree(expected))
    places = flat(structure.shardings(mesh))
    made = {path for path, x in flat(found).items() if path.endswith("_scale") or x.dtype == "int8"}
    assert len(made) == 2 * (1 + 1 + 7)
    assert {path: flat(found)[path].sharding for path in made} == {p: places[p] for p in made}


MAGNITUDE = st.floats(-80, 80).map(lambda power: float(np.float32(2.0**power)))


@hypothesis.given(
    st.sampled_from([(3, 4), (2, 5, 3)]).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32))
    ),
    st.integers(1, 2), MAGNITUDE, st.sampled_from([jnp.float32, jnp.bfloat16]),
)  # fmt: skip
def test_no_weight_is_further_than_half_a_step(weight, inputs, magnitude, dtype):
    weight = jnp.asarray(weight * np.float32(magnitude), dtype)
    summed = tuple(range(-inputs, 0))
    values, scale = map(np.asarray, quantize(weight, summed))
    assert (values.dtype, scale.dtype) == (np.int8, np.float32)
    scale, weight = np.expand_dims(scale, summed).astype(np.float64), np.asarray(weight, np.float64)
    assert np.all(scale > 0)
    assert np.all(np.abs(weight - values * scale) <= 0.5001 * scale)
    largest = np.max(np.abs(weight), axis=summed)
    steps = np.max(np.abs(values.astype(int)), axis=summed)
    assert np.all(steps[largest > 1e-30] == 127)


def test_ties_go_to_even_and_a_channel_of_zeros_stays_zero():
    values, scale = quantize(jnp.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6]), (-1,))
    np.testing.assert_array_equal(values, [[127, 0, 2, 2, 0, -2], [0] * 6])
    np.testing.assert_array_equal(scale, [1, 1])


@pytest.mark.parametrize(
    "config",
    [
        DecoderConfig.llama(
            vocab_size=128_256, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8,
            head_dim=128, mlp_dim=14336,
        ),
        DecoderConfig.palm(
            vocab_size=256_128, embed_dim=18432, num_layers=118, num_heads=48, head_dim=256,
            mlp_dim=4 * 18432,
        ),
        DecoderConfig.gemma(
            vocab_size=256_000, embed_dim=2304, num_layers=26, num_heads=8, num_kv_heads=4,
            head_dim=256, mlp_dim=9216, post_norms=True,
        ),
    ],
    ids=["Llama 3 8B", "PaLM 540B", "Gemma 2 2B"],
)  # fmt: skip
def test_half_the_bytes_of_bfloat16(config):
    found, stored = (
        size_in_bytes(decoder_structure(each).abstract()) for each in (int8(config), config)
    )
    assert 0.5 < found / (stored / 2) <= 0.51


def test_the_config_says_so_in_json_and_refuses_other_weights():
    config = int8(palm())
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(CalmError, match=r"weights is 'int3'; known are \(None, 'int8', 'int4'\)"):
        palm(weights="int3")


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}])
def test_on_eight_devices_it_computes_the_same(shape):
    mesh = sharding.make_mesh(shape)
    model = quantized(random_decoder(llama(attention_bias=True)))  # 2 key heads
    structure = decoder_structure(model.config)
    places = structure.shardings(mesh)
    attention = places["layers"]["attention"]
    kept = None if shape["tensor"] > 2 else "tensor"
    assert attention["key"].spec == PartitionSpec(None, "fsdp", kept, None)
    assert attention["key_scale"].spec == PartitionSpec(None, kept, None)
    assert attention["query_scale"].spec == PartitionSpec(None, "tensor", None)
    assert attention["output_scale"].spec == PartitionSpec(None, "fsdp")
    assert places["embedding_scale"].spec == PartitionSpec("tensor")
    tokens = np.random.default_rng(0).integers(24, size=(8, 9)).astype(np.int32)
    with jax.set_mesh(mesh):
        tree = jax.device_put(module_tree(model), places)
        found = jax.jit(lambda tree, tokens: structure.merge(tree).forward(tokens))(tree, tokens)
    assert_close(found, model(tokens))


COMPOSITION = CompositionConfig(every=1, init="paper")


@functools.cache
def composed_pair():
    """A composition of two int8 decoders, and of the float ones that they stand for."""
    models = [
        quantized(tiny_models.decoder(1, "llama", num_layers=2)),
        quantized(tiny_models.decoder(2, num_layers=2, embed_dim=16)),
    ]
    twins = [float_twin(model) for model in models]
    return [compose(*pair, COMPOSITION, rngs=nnx.Rngs(5)) for pair in (models, twins)]


@pytest.mark.slow
def test_the_bridges_gradient_on_eight_devices_is_that_over_the_float_twins():
    composed, twin = composed_pair()
    tokens = np.random.default_rng(0).integers(64, size=(8, 9)).astype(np.int32)
    goal = np.random.default_rng(1).normal(size=(8, 9, 64)).astype(np.float32)

    def gradient(structure):
        def loss(bridge, frozen):
            logits = structure.merge({**frozen, "bridge": bridge}).forward(tokens)
            return jnp.sum(logits * goal)

        return jax.jit(jax.value_and_grad(loss))

    def of(model, mesh):
        structure = Structure(model)
        with jax.set_mesh(mesh):
            tree = jax.device_put(module_tree(model), structure.shardings(mesh))
            return gradient(structure)(tree.pop("bridge"), tree)

    loss, found = of(composed, sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    expected_loss, expected = of(twin, sharding.make_mesh({}, jax.devices()[:1]))
    assert_close(loss, expected_loss)
    for (path, slope), wanted in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert np.any(wanted), path_name(path)
        assert_close(slope, wanted, 2e-4)


def test_a_composition_generates_what_its_float_twin_does():
    composed, twin = composed_pair()
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5], [8, 9, 7, 9, 3, 2, 3]]
    found = generate(composed, prompts, max_new_tokens=6)
    np.testing.assert_array_equal(found, generate(twin, prompts, max_new_tokens=6))
    assert len(np.unique(found)) > 1


@pytest.mark.parametrize("what", ["forward", "bridge gradient"])
def test_no_stacked_weight_is_ever_whole_in_float(what):
    """The whole of one, the MLP's of the anchor, would be a third of the int8 bytes and fail."""
    sizes = {"vocab_size": 16, "embed_dim": 128, "num_heads": 2, "head_dim": 64, "mlp_dim": 512}
    anchor = DecoderConfig.palm(num_layers=48, dtype="bfloat16", weights="int8", **sizes)
    augment = dataclasses.replace(anchor, num_layers=24)
    structure = Structure(
        nnx.eval_shape(
            lambda: compose(
                Decoder(anchor, nnx.Rngs(0)), Decoder(augment, nnx.Rngs(0)),
                CompositionConfig(every=8), rngs=nnx.Rngs(0),
            )
        )
    )  # fmt: skip
    frozen = structure.abstract()
    bridge = frozen.pop("bridge")

    def loss(bridge, frozen, tokens):
        return jnp.sum(structure.merge({**frozen, "bridge": bridge}).forward(tokens))

    function = loss if what == "forward" else jax.grad(loss)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    memory = jax.jit(function).lower(bridge, frozen, tokens).compile().memory_analysis()
    assert memory.temp_size_in_bytes < size_in_bytes(frozen) / 4
