"""int4 weights: what they stand for, how near they are, where they live and what they cost."""

import dataclasses
import functools
import json
import re

import gguf
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
from quantized_models import (
    DECODERS,
    KEPT,
    flat,
    float_twin,
    int4_values,
    nested,
    of_int4,
    rms,
    stood_for,
)
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
from calm_jax.models.parameters import Structure, check_same_tree, module_tree, size_in_bytes
from calm_jax.models.quantized import quantize_in_groups, quantized_leaves

quantized = functools.partial(quantized_models.quantized, kind="int4")
# Two groups of the width, and three of 16 of the MLP.
WIDER = {"embed_dim": 64, "mlp_dim": 48, "num_layers": 2}


def int4(config, **fields):
    return dataclasses.replace(config, weights="int4", **fields)


def wider(family):
    return dataclasses.replace(DECODERS[family], **WIDER)


def numpy_group(weights):
    """(q, s) of one group, by the rule as it is written."""
    furthest = weights[np.argmax(np.abs(weights))]
    found = []
    for steps in (8, 7):
        size = min(max(np.float32(abs(furthest) / np.float32(steps)), 2.0**-20), 65504.0)
        scale = np.float16(-size if furthest > 0 else size)
        values = np.rint(weights / np.float32(scale))
        if np.all(values <= 7):
            error = np.sum(np.square(weights - values * np.float32(scale), dtype=np.float32))
            found.append((error, values, scale))
    return min(found, key=lambda each: each[0])[1:]


def numpy_quantized(weight, axis):
    """(q, s) with groups along an axis: the largest even ones that divide it, of at most 32."""
    size = weight.shape[axis]
    group = max(divisor for divisor in range(2, 33, 2) if size % divisor == 0)
    last = np.moveaxis(weight, axis, -1)
    found = [numpy_group(each) for each in last.reshape(-1, group)]
    values = np.stack([values for values, _ in found]).reshape(last.shape)
    scales = np.stack([scale for _, scale in found]).reshape(*last.shape[:-1], size // group)
    return [np.moveaxis(x, -1, axis) for x in (values, scales)]


@pytest.mark.parametrize("family", DECODERS)
def test_logits_are_those_of_the_weights_it_stands_for(family):
    model = quantized(random_decoder(wider(family)))
    tree, batch = stood_for(module_tree(model)), packed_batch()[:3]
    found = model(as_inputs(*batch))
    assert found.dtype == np.float32
    assert_close(found, numpy_calm.decoder_logits(model.config, tree, *batch))


@pytest.mark.parametrize("family", ["palm", "llama", "gemma 3", "gpt-j"])
def test_logits_are_near_those_of_the_float_weights(family):
    """Errors are 8 % of a normal weight here; three layers add them up. Gemma 3's norms of the
    branches' results add as much again."""
    config = dataclasses.replace(DECODERS[family], embed_dim=128, head_dim=32, mlp_dim=256)
    structure = decoder_structure(config)
    original = structure.merge(jax.jit(lambda: module_tree(Decoder(config, nnx.Rngs(0))))())
    model = quantized(original)
    tokens = packed_batch()[0]
    expected, found = np.asarray(original(tokens)), np.asarray(model(tokens))
    assert 0.05 < rms(found - expected) / rms(expected) <= 0.4
    bfloat16 = decoder_structure(dataclasses.replace(model.config, dtype="bfloat16"))
    rounded = bfloat16.merge(module_tree(model))(tokens)
    assert rms(rounded - found) <= 0.02 * rms(found)


@pytest.mark.parametrize("family", DECODERS)
def test_every_matrix_and_nothing_else_is_quantized(family):
    original = random_decoder(wider(family))
    before, after = flat(module_tree(original)), flat(module_tree(quantized(original)))
    for path, weight in before.items():
        kept = KEPT.get(path.split("/")[-1])
        if kept is None:
            assert after.pop(path) is weight
        else:
            values, scale = after.pop(path), after.pop(f"{path}_scale")
            assert (values.dtype, scale.dtype) == (np.uint8, np.float16)
            axis = weight.ndim - kept - 1
            expected = numpy_quantized(np.asarray(weight), axis)
            values = int4_values(np.asarray(values), scale.shape[axis], axis)
            np.testing.assert_array_equal(values, expected[0])
            np.testing.assert_array_equal(scale, expected[1])
    assert not after


def test_a_random_decoder_is_the_quantized_one_of_its_seed():
    config = llama(attention_bias=True, **WIDER)
    found = module_tree(Decoder(int4(config), nnx.Rngs(3)))
    expected = module_tree(quantized(Decoder(config, nnx.Rngs(3))))
    structure = decoder_structure(int4(config))
    check_same_tree(structure.abstract(), found, "random")
    assert jax.tree.map(lambda x: x.dtype, structure.abstract()) == jax.tree.map(
        lambda x: x.dtype, found
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("apart", [False, True])
def test_leaves_of_stacked_layers(apart):
    """A stack comes whole, or as an iterator of its layers."""
    whole = random_decoder(llama(**WIDER))
    expected = quantized(random_decoder(llama(**WIDER)))
    structure = Structure(expected)
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    leaves = flat(module_tree(whole))
    if apart:
        layers = [path for path in Structure(whole).summed() if path.startswith("layers/")]
        leaves |= {path: iter(leaves[path]) for path in layers}
    places = structure.shardings(mesh)
    leaves = quantized_leaves(leaves.items(), Structure(whole), places, "int4")
    found = nested(dict(leaves))
    jax.tree.map(np.testing.assert_array_equal, found, module_tree(expected))
    made = {
        path for path, x in flat(found).items() if path.endswith("_scale") or x.dtype == "uint8"
    }
    assert len(made) == 2 * (1 + 1 + 7)
    assert {path: flat(found)[path].sharding for path in made} == {
        path: flat(places)[path] for path in made
    }


@hypothesis.given(
    st.sampled_from([(64, 2), (2, 40, 3), (4, 7)]).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32))
    ),
    st.floats(-30, 18).map(lambda power: float(np.float32(2.0**power))),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
)  # fmt: skip
def test_no_weight_is_further_than_half_a_step(weight, magnitude, dtype):
    weight = jnp.asarray(weight * np.float32(magnitude), dtype)
    values, scale = map(np.asarray, quantize_in_groups(weight, (-2,)))
    assert (values.dtype, scale.dtype) == (np.uint8, np.float16)
    size = weight.shape[-2]
    group = {64: 32, 40: 20, 4: 4}[size]
    values = int4_values(values, size // group, -2)
    scale = np.repeat(scale.astype(np.float64), group, axis=-2)
    weight = np.asarray(weight, np.float64)
    assert np.all(np.abs(scale) >= 2.0**-20)
    assert np.all(np.abs(weight - values * scale) <= 0.5001 * np.abs(scale))
    largest = np.max(np.abs(weight).reshape(-1, group, weight.shape[-1]), axis=-2)
    steps = np.max(np.abs(values).reshape(-1, group, weight.shape[-1]), axis=-2)
    assert np.all(steps[largest > 1e-5] >= 7)


@pytest.mark.parametrize(
    ("weights", "values", "scale"),
    [
        ([-8, 0.5, 1.5, 2, -0.5, -2, 7, 0], [-8, 0, 2, 2, 0, -2, 7, 0], 1),
        ([8, -0.5, 1.5, 7, -7, 3, 0, 0], [-8, 0, -2, -7, 7, -3, 0, 0], -1),
        ([-7, 7, 1, 2, 3, 4, 5, 6], [-7, 7, 1, 2, 3, 4, 5, 6], 1),  # 8 would be needed
        ([0] * 8, [0] * 8, 2.0**-20),
    ],
)
def test_groups_by_hand(weights, values, scale):
    found = quantize_in_groups(jnp.array(weights, jnp.float32)[None], (-1,))
    np.testing.assert_array_equal(int4_values(np.asarray(found[0]), 1, -1), [values])
    np.testing.assert_array_equal(found[1], [[scale]])


@pytest.mark.parametrize("imatrix", [False, True])
def test_the_values_of_q4_0_are_found_again(imatrix):
    """To the last bit; also where a search for the best scale left out the -8."""
    random = np.random.default_rng(0)
    blocks = gguf.quants.quantize(
        (0.02 * random.normal(size=(24, 96))).astype(np.float32), gguf.GGMLQuantizationType.Q4_0
    )
    if imatrix:
        blocks = blocks.reshape(24, 3, 18)
        nibbles = random.integers(1, 16, size=(24, 3, 32), dtype=np.uint8)
        nibbles[..., 5] = random.choice([1, 15], size=(24, 3))
        blocks[..., 2:] = nibbles[..., :16] | nibbles[..., 16:] << 4
        blocks = blocks.reshape(24, 54)
    stored = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)
    values, scale = map(np.asarray, jax.jit(lambda x: quantize_in_groups(x, (-1,)))(stored))
    np.testing.assert_array_equal(of_int4(values, scale, -1), stored)
    if not imatrix:  # and it is a block's own form
        scales, nibbles = np.split(blocks.reshape(24, 3, 18), [2], axis=-1)
        np.testing.assert_array_equal(scale, scales.copy().view(np.float16)[..., 0])
        np.testing.assert_array_equal(values.reshape(24, 3, 16) ^ 0x88, nibbles)


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
def test_four_and_a_half_bits_a_weight(config):
    found, stored = (
        size_in_bytes(decoder_structure(each).abstract()) for each in (int4(config), config)
    )
    assert 4.5 / 32 < found / stored <= 4.51 / 32


def test_the_config_says_so_in_json_and_names_a_matrix_without_groups():
    config = int4(palm())
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    message = "layers/mlp/down: mlp of size 37 has no even divisor from 8 to 32, the weights"
    with pytest.raises(CalmError, match=message) as error:
        decoder_structure(int4(palm(mlp_dim=37)))
    assert "\n" not in str(error.value)
    decoder_structure(int4(palm(mlp_dim=6)))


@pytest.mark.parametrize(
    "shape",
    [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"fsdp": 4, "tensor": 2}],
)
def test_on_eight_devices_it_computes_the_same(shape):
    mesh = sharding.make_mesh(shape)
    config = llama(attention_bias=True, mlp_dim=64, embed_dim=64, num_layers=2)  # 2 key heads
    model = quantized(random_decoder(config))
    structure = decoder_structure(model.config)
    places = structure.shardings(mesh)
    attention, mlp = places["layers"]["attention"], places["layers"]["mlp"]
    kept = None if shape["tensor"] > 2 else "tensor"
    # Both groups of the width are whole on two devices, not on four.
    width = "fsdp" if shape["fsdp"] == 2 else None
    assert attention["key"].spec == PartitionSpec(None, "fsdp", kept, None)
    assert attention["key_scale"].spec == PartitionSpec(None, width, kept, None)
    assert attention["query_scale"].spec == PartitionSpec(None, width, "tensor", None)
    assert attention["output_scale"].spec == PartitionSpec(None, "tensor", None, "fsdp")
    assert mlp["down_scale"].spec == PartitionSpec(None, kept, "fsdp")
    assert places["embedding_scale"].spec == PartitionSpec("tensor", width)
    tokens = np.random.default_rng(0).integers(24, size=(8, 9)).astype(np.int32)
    with jax.set_mesh(mesh):
        tree = jax.device_put(module_tree(model), places)
        forward = jax.jit(lambda tree, tokens: structure.merge(tree).forward(tokens))
        forward = forward.lower(tree, tokens).compile()
        found = forward(tree, tokens)
    assert_close(found, model(tokens))
    gathers = re.findall(r"= (.*) all-gather\(", forward.as_text())
    # A layer's seven matrices, and the head.
    assert sum(gather.count("u8[") for gather in gathers) == 8


COMPOSITION = CompositionConfig(every=1, init="paper")


@functools.cache
def composed_pair():
    """A composition of two int4 decoders, and of the float ones that they stand for."""
    models = [
        quantized(tiny_models.decoder(1, "llama", num_layers=2, embed_dim=64)),
        quantized(tiny_models.decoder(2, num_layers=2, embed_dim=16)),
    ]
    twins = [float_twin(model) for model in models]
    return [compose(*pair, COMPOSITION, rngs=nnx.Rngs(5)) for pair in (models, twins)]


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
    for slope, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(slope, wanted, 2e-4)


def test_a_composition_generates_what_its_float_twin_does():
    composed, twin = composed_pair()
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5], [8, 9, 7, 9, 3, 2, 3]]
    found = generate(composed, prompts, max_new_tokens=6)
    np.testing.assert_array_equal(found, generate(twin, prompts, max_new_tokens=6))
    assert len(np.unique(found)) > 1


@pytest.mark.parametrize("what", ["forward", "bridge gradient"])
def test_two_weights_take_a_byte_and_no_stack_is_ever_whole_in_float(what):
    sizes = {"vocab_size": 16, "embed_dim": 128, "num_heads": 2, "head_dim": 64, "mlp_dim": 512}
    anchor = DecoderConfig.palm(num_layers=48, dtype="bfloat16", weights="int4", **sizes)
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
    held = size_in_bytes(bridge) + size_in_bytes(frozen)
    assert memory.argument_size_in_bytes <= held + 1000
    assert memory.temp_size_in_bytes < size_in_bytes(frozen) / 3
