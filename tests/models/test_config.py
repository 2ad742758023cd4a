"""Configs: what they refuse, and that JSON keeps them whole."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest
from random_models import SIZES, palm

from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, DecoderConfig, RopeScaling
from calm_jax.models.config import heads

REQUIRED = {**SIZES, "num_layers": 2, "num_kv_heads": 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "decoder.vocab_size is 0; it must be at least 1"),
        ({"mlp_dim": -4}, "decoder.mlp_dim is -4"),
        ({"block": "serial"}, r"decoder.block is 'serial'; known are \('sequential', 'parallel'\)"),
        ({"activation": "relu"}, "decoder.activation is 'relu'"),
        ({"norm": "batch"}, "decoder.norm is 'batch'"),
        ({"qk_norm": "layer"}, "decoder.qk_norm is 'layer'"),
        ({"rope": "whole"}, "decoder.rope is 'whole'"),
        ({"dtype": "float16"}, "decoder.dtype is 'float16'"),
        ({"num_kv_heads": 3}, "decoder.num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"rope_dim": 3}, "3 rotated features; they must be even"),
        ({"rope_dim": 10}, "10 rotated features; .* at most head_dim 8"),
        ({"head_dim": 7}, "7 rotated features"),
        ({"block": "parallel", "post_norms": True}, "decoder.post_norms .* parallel block"),
        ({"window": 0}, "decoder.window is 0"),
        ({"window": 4, "window_pattern": ()}, "decoder.window_pattern is empty"),
        ({"xpos_scale_base": 512, "rope": "interleaved"}, "xpos_scale_base .* 'half'"),
        ({"xpos_scale_base": 512, "rope_dim": 4}, "xpos_scale_base .* all of head_dim"),
    ],
)
def test_decoder_config_refuses(fields, message):
    with pytest.raises(CalmError, match=message):
        DecoderConfig(**{**REQUIRED, **fields})


def test_rope_scaling_refuses_an_unknown_kind():
    with pytest.raises(CalmError, match=r"rope_scaling\.kind is 'yarn'"):
        RopeScaling(kind="yarn")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": "ones"}, "composition.init is 'ones'; known are 'zero' and 'paper'"),
        ({"connections": ()}, "composition.connections is empty"),
        ({"connections": ((1, 2), (0, 0), (1, 2))}, r"connections lists \(1, 2\) twice"),
        ({"connections": (3, 7)}, r"connections: 3 is not a pair .* as \(\(3, 7\),\)"),
        ({"connections": ((3, 3, 3),)}, r"connections: \(3, 3, 3\) is not a pair \(augment layer,"),
    ],
)
def test_composition_config_refuses(fields, message):
    with pytest.raises(CalmError, match=message):
        CompositionConfig(**fields)
    with pytest.raises(CalmError, match=message):
        CompositionConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": 3}, "num_heads 3 does not divide the anchor's width 16"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"num_heads": 2, "head_dim": 4, "output_projection": False}, "= 2 x 4 .* width 16"),
        ({"num_heads": 16, "rotary": True}, "even head_dim, not 1"),
    ],
)
def test_heads_refuse(fields, message):
    with pytest.raises(CalmError, match=message):
        heads(CompositionConfig(**fields), palm())


def test_heads_default_to_the_anchors():
    anchor = palm(embed_dim=24, num_heads=6, head_dim=10)
    assert heads(CompositionConfig(), anchor) == (6, 4)
    assert heads(CompositionConfig(num_heads=5, head_dim=2), anchor) == (5, 2)


def test_paper_is_the_bridge_of_the_paper():
    config = CompositionConfig.paper(every=2)
    assert config.every == 2
    assert config.init == "paper"
    assert config.output_projection
    assert not (config.norms or config.gate or config.bias or config.rotary or config.encoder_only)


def test_families():
    assert palm().block == "parallel"
    assert (palm().num_kv_heads, palm().norm_offset, palm().tied_head) == (1, 1.0, True)
    assert palm().logit_scale == SIZES["embed_dim"] ** -0.5
    llama = DecoderConfig.llama(**REQUIRED)
    assert (llama.block, llama.norm_offset, llama.tied_head) == ("sequential", 0.0, False)
    gemma = DecoderConfig.gemma(**REQUIRED)
    assert (gemma.norm_offset, gemma.activation, gemma.embed_scale) == (1.0, "gelu_tanh", 4.0)


@pytest.mark.parametrize(
    ("pattern", "window", "expected"),
    [
        ((True, False), 4, (True, False, True, False, True)),
        ((True, True, False), 4, (True, True, False, True, True)),
        ((True,), None, (False,) * 5),
    ],
)
def test_local_layers(pattern, window, expected):
    config = palm(num_layers=5, window=window, window_pattern=pattern)
    assert config.local_layers == expected


size = st.integers(1, 64)
number = st.floats(1e-6, 1e6)
kind = st.sampled_from(["linear", "llama3"])
scalings = st.builds(RopeScaling, kind, number, number, number, size)
decoder_configs = st.builds(
    lambda groups, half, **fields: DecoderConfig(
        num_heads=groups * fields["num_kv_heads"], head_dim=2 * half, rope_dim=2, **fields
    ),
    groups=size,
    half=size,
    num_kv_heads=size,
    vocab_size=size,
    embed_dim=size,
    num_layers=size,
    mlp_dim=size,
    activation=st.sampled_from(["silu", "gelu"]),
    qk_norm=st.sampled_from([None, "rms", "l2"]),
    rope=st.sampled_from([None, "half", "interleaved"]),
    rope_scaling=st.none() | scalings,
    local_rope_base=st.none() | number,
    window=st.none() | size,
    window_pattern=st.lists(st.booleans(), min_size=1, max_size=6).map(tuple),
    final_logit_cap=st.none() | number,
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
layer = st.integers(0, 99)
composition_configs = st.builds(
    CompositionConfig,
    connections=st.none() | st.lists(st.tuples(layer, layer), min_size=1, unique=True).map(tuple),
    every=size,
    num_heads=st.none() | size,
    init=st.sampled_from(["zero", "paper"]),
    gate=st.booleans(),
    rotary=st.booleans(),
    scan=st.booleans(),
)


@hypothesis.settings(deadline=None)
@hypothesis.given(decoder_configs | composition_configs)
def test_json_keeps_a_config_whole(config):
    stored = json.loads(json.dumps(config.to_dict()))
    again = type(config).from_dict(stored)
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (DecoderConfig, {**REQUIRED, "width": 3}, "decoder.width is not a known field; known are"),
        (DecoderConfig, {"vocab_size": 3}, "decoder.embed_dim is missing"),
        (
            DecoderConfig,
            {**REQUIRED, "rope_scaling": {"kinds": 1}},
            "decoder.rope_scaling.kinds is",
        ),
        (CompositionConfig, {"evry": 4}, "composition.evry is not a known field"),
    ],
)
def test_from_dict_refuses(cls, values, message):
    with pytest.raises(CalmError, match=message):
        cls.from_dict(values)
