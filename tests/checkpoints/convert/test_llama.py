"""Llama, Mistral, Qwen 2 and 3 of transformers: config.json, names, and committed outputs."""

import dataclasses
import json
import pathlib
import shutil

import hypothesis
import numpy as np
import pytest
from etils import epath
from hypothesis import strategies as st

import calm_jax
from calm_jax import DecoderConfig
from calm_jax.checkpoints.convert.huggingface_config import GLOBAL, LOCAL, local_layer_fields
from calm_jax.checkpoints.convert.llama import Llama, Mistral, Qwen2, Qwen3
from calm_jax.checkpoints.convert.table import check_names, check_shapes, sizes
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.checkpoints.sources.source import Source
from calm_jax.errors import CalmError
from calm_jax.models.config import RopeScaling
from tests.converting import decoder_in_memory

WHERE = "model/config.json"
GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = (Llama(), Mistral(), Qwen2(), Qwen3())
BY_NAME = {"argvalues": FAMILIES, "ids": lambda family: family.name}
SIZES = {
    "vocab_size": 32,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("family", **BY_NAME)
def test_logits_of_transformers(family):
    """The outputs are by tests/parity/make_golden.py."""
    source = open_source(GOLDEN / family.name)
    assert [known for known in FAMILIES if known.recognises(source)] == [family]
    with np.load(GOLDEN / family.name / "logits.npz") as golden:
        logits = np.asarray(decoder_in_memory(family, source)(golden["tokens"]))
        difference = np.max(np.abs(logits - golden["logits"]))
        assert difference <= 1e-5 * np.max(np.abs(golden["logits"]))


POSITIVE = st.floats(1e-3, 1e7)
SCALINGS = st.none() | POSITIVE.map(lambda factor: RopeScaling("linear", factor)) | st.builds(
    RopeScaling,
    st.just("llama3"),
    POSITIVE,
    st.floats(0.1, 1.0),
    st.floats(1.1, 8.0),
    st.integers(1, 10**5),
)  # fmt: skip


@st.composite
def configs(draw, family):
    """Forms that `family` can express."""
    num_kv_heads = draw(st.integers(1, 3))
    num_layers = draw(st.integers(1, 7))
    bias = draw(st.booleans())
    local = draw(st.lists(st.booleans(), min_size=num_layers, max_size=num_layers))
    windows = local_layer_fields(local, draw(st.integers(1, 50)))
    own = {
        "llama": {"attention_bias": bias, "output_bias": bias, "mlp_bias": draw(st.booleans())},
        "mistral": {"window": draw(st.none() | st.integers(1, 50))},
        "qwen2": {"attention_bias": True, **windows},
        "qwen3": {"attention_bias": bias, "output_bias": bias, "qk_norm": "rms", **windows},
    }
    return DecoderConfig.llama(
        vocab_size=draw(st.integers(1, 40)),
        embed_dim=draw(st.integers(1, 40)),
        num_layers=num_layers,
        num_heads=num_kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        mlp_dim=draw(st.integers(1, 40)),
        norm_eps=draw(POSITIVE),
        activation=draw(st.sampled_from(["silu", "gelu", "gelu_tanh"])),
        tied_head=draw(st.booleans()),
        rope_base=draw(POSITIVE),
        rope_scaling=draw(SCALINGS),
        **own[family.name],
    )


@pytest.mark.parametrize("family", **BY_NAME)
def test_config_json_is_read_back_as_it_was(family):
    @hypothesis.given(configs(family))
    @hypothesis.settings(max_examples=150)
    def check(config):
        values = json.loads(json.dumps(family.huggingface_config(config)))
        assert family.decoder_config(values, WHERE) == config

    check()


def test_rotary_positions_are_written_in_both_spellings():
    """transformers 4 reads no `rope_parameters`, and took 10,000 for the base without a word."""
    config = DecoderConfig.llama(**TINY, rope_base=5e5, rope_scaling=RopeScaling("linear", 4.0))
    linear = {"rope_type": "linear", "factor": 4.0}
    for family in FAMILIES:
        values = family.huggingface_config(config)
        assert (values["rope_theta"], values["rope_scaling"]) == (5e5, linear)
        assert values["rope_parameters"] == {"rope_theta": 5e5, **linear}
        values = family.huggingface_config(dataclasses.replace(config, rope_scaling=None))
        assert values["rope_scaling"] is None  # one of the model's origin does not come through
        assert values["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}


@pytest.mark.parametrize("family", **BY_NAME)
def test_a_form_of_another_family_is_read_back_as_something_else(family):
    """By which an export knows that this family is not the one."""
    for change in ({"post_norms": True}, {"norm_offset": 1.0}, {"attention_logit_cap": 5.0}):
        config = DecoderConfig.llama(**{**TINY, **change})
        assert family.decoder_config(family.huggingface_config(config), WHERE) != config


TINY = {
    "vocab_size": 32,
    "embed_dim": 12,
    "num_layers": 3,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 6,
    "mlp_dim": 8,
}


def test_absent_keys_mean_what_they_mean_to_transformers():
    fields = ("vocab_size", "mlp_dim", "num_kv_heads", "head_dim", "window", "attention_bias")
    found = {
        family.name: [getattr(family.decoder_config({}, WHERE), field) for field in fields]
        for family in FAMILIES
    }
    assert found == {
        "llama": [32_000, 11_008, 32, 128, None, False],
        "mistral": [32_000, 14_336, 8, 128, 4096, False],
        "qwen2": [151_936, 22_016, 32, 128, None, True],
        "qwen3": [151_936, 22_016, 32, 128, None, False],
    }
    for family in FAMILIES:
        config = family.decoder_config({}, WHERE)
        assert (config.embed_dim, config.num_layers, config.num_heads) == (4096, 32, 32)
        assert (config.norm_eps, config.rope_base, config.tied_head) == (1e-6, 1e4, False)
        assert (config.activation, config.norm_offset, config.rope_scaling) == ("silu", 0.0, None)


def test_widths_of_heads():
    values = SIZES | {"hidden_size": 24}
    assert Llama().decoder_config(values, WHERE).head_dim == 6
    assert Llama().decoder_config(values | {"head_dim": None}, WHERE).head_dim == 6
    assert Mistral().decoder_config(values | {"head_dim": 16}, WHERE).head_dim == 16
    assert Qwen3().decoder_config(values, WHERE).head_dim == 128
    values = values | {"num_key_value_heads": None}
    for family in FAMILIES:
        assert family.decoder_config(values, WHERE).num_kv_heads == 4


LLAMA_3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA_3}},
        {"rope_theta": 500000, "rope_scaling": {"type": "llama3", **LLAMA_3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA_3}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **LLAMA_3}},
        {
            "rope_theta": 5e5,
            "max_position_embeddings": 8192,
            "rope_scaling": {
                "rope_type": "llama3",
                **{key: x for key, x in LLAMA_3.items() if not key.startswith("original")},
            },
        },
    ],
)
def test_spellings_of_rotary_scaling(values):
    config = Llama().decoder_config(SIZES | {"head_dim": 4} | values, WHERE)
    assert config.rope_base == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def test_windows_of_qwen():
    values = SIZES | {"head_dim": 4, "sliding_window": 5, "max_window_layers": 3}
    on = values | {"use_sliding_window": True}
    for family in (Qwen2(), Qwen3()):
        assert family.decoder_config(values, WHERE).window is None
        config = family.decoder_config(on, WHERE)
        assert (config.window, config.local_layers) == (5, (False, False, False, True))
        assert family.decoder_config(on | {"max_window_layers": 4}, WHERE).window is None
        assert all(family.decoder_config(on | {"max_window_layers": 0}, WHERE).local_layers)
        listed = on | {"layer_types": [LOCAL, GLOBAL, GLOBAL, LOCAL]}
        config = family.decoder_config(listed, WHERE)
        assert config.local_layers == (True, False, False, True)
        whole = values | {"layer_types": [GLOBAL] * 4, "sliding_window": None}
        assert family.decoder_config(whole, WHERE).window is None


def test_harmless_keys_are_ignored():
    harmless = {
        "pretraining_tp": 2,
        "use_cache": False,
        "attention_dropout": 0.1,
        "transformers_version": "4.31.0",
        "torch_dtype": "float16",
        "rope_scaling": None,
        "quantization_config": None,
        "partial_rotary_factor": 1.0,
    }
    values = SIZES | {"head_dim": 4}
    for family in FAMILIES:
        known = family.decoder_config(values, WHERE)
        assert family.decoder_config(values | harmless, WHERE) == known


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        (Llama, {"hidden_size": "12"}, "hidden_size is '12'; it must be a whole number"),
        (Llama, {"hidden_size": 12.0}, "hidden_size is 12.0"),
        (Llama, {"hidden_size": None}, "hidden_size is None"),
        (Llama, {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (Llama, {"num_hidden_layers": True}, "num_hidden_layers is True"),
        (Llama, {"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        (Llama, {"head_dim": "8"}, "head_dim is '8'"),
        (Llama, {"hidden_size": 13}, "hidden_size 13 .*num_attention_heads 4"),
        (Llama, {"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        (Llama, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        (Llama, {"rope_theta": float("inf")}, "rope_theta is inf"),
        (Llama, {"rope_theta": 10**400}, "rope_theta is 1000.*it must be a finite number"),
        (Llama, {"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true'"),
        (Llama, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        (Llama, {"attention_bias": None}, "attention_bias is None"),
        (Llama, {"mlp_bias": 0}, "mlp_bias is 0"),
        (Llama, {"hidden_act": "relu2"}, "hidden_act is 'relu2'; it must be one of silu"),
        (Llama, {"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]"),
        (Llama, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type is 'yarn'"),
        (Llama, {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "is 'dynamic'"),
        (Llama, {"rope_parameters": {"rope_type": "longrope"}}, "is 'longrope'"),
        (Llama, {"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        (Llama, {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        (Llama, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is mis"),
        (
            Llama,
            {"rope_scaling": {"rope_type": "llama3", **LLAMA_3, "low_freq_factor": 4.0}},
            "low_freq_factor 4.0 is not below high_freq_factor 4.0",
        ),
        (Llama, {"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        (Llama, {"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'"),
        (Llama, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (Llama, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0"),
        (Llama, {"rope_parameters": {LOCAL: {"rope_theta": 1e4}}}, "sliding_attention"),
        (Mistral, {"sliding_window": 0}, "sliding_window is 0"),
        (Mistral, {"sliding_window": "4"}, "sliding_window is '4'"),
        (Mistral, {"layer_types": [LOCAL, GLOBAL] * 2}, "layer_types contradicts sliding_window"),
        (Mistral, {"sliding_window": None, "layer_types": [LOCAL] * 4}, "layer_types contradicts"),
        (Qwen2, {"use_sliding_window": 1}, "use_sliding_window is 1"),
        (Qwen2, {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1"),
        (Qwen2, {"layer_types": [LOCAL] * 4}, "layer_types has sliding_attention"),
        (Qwen3, {"layer_types": [GLOBAL] * 3}, "layer_types .*4 layers"),
        (Qwen3, {"layer_types": ["chunked_attention"] * 4}, "layer_types is .*chunked"),
        (Qwen3, {"head_dim": 7}, "7 rotated features"),
    ],
)  # fmt: skip
def test_what_is_wrong_or_not_supported_is_named(family, values, message):
    with pytest.raises(CalmError, match=message) as error:
        family().decoder_config(SIZES | {"head_dim": 4} | values | _own_head_dim(values), WHERE)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith((WHERE, "decoder"))


def _own_head_dim(values):
    return {"head_dim": None} if values.get("hidden_size") == 13 else {}


def random_source(family, config, values, seed=0):
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(size=line.source_shape(sizes(config))).astype(np.float32)
        for line in family.rules(config)
        for name in line.names(config.num_layers)
    }
    return Source(epath.Path("model"), "huggingface", tensors, values)


@pytest.mark.parametrize("family", **BY_NAME)
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_checked(family, tied):
    values = SIZES | {"head_dim": 4, "tie_word_embeddings": tied}
    config = family.decoder_config(values, WHERE)
    tensors = dict(random_source(family, config, values).tensors)

    def check(tensors):
        rules, unused = family.rules(config), family.unused(config)
        check_names(rules, unused, config.num_layers, tensors, "model")
        check_shapes(rules, config, tensors, "model")

    check(tensors)
    check(tensors | {"model.layers.3.self_attn.rotary_emb.inv_freq": np.ones(3)})
    for name in tensors:
        with pytest.raises(CalmError, match=f"tensor {name.replace('.', '[.]')} is missing"):
            check({key: x for key, x in tensors.items() if key != name})
        with pytest.raises(CalmError, match=f"tensor {name.replace('.', '[.]')} has shape"):
            check(tensors | {name: np.ones((5, 7))})
    more_rows = np.ones((33, 12), np.float32)
    with pytest.raises(CalmError, match=r"embed_tokens.weight has shape \(33, 12\).*\(32, 12\)"):
        check(tensors | {"model.embed_tokens.weight": more_rows})
    for name in (
        "model.layers.4.mlp.up_proj.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.0.self_attn.sinks",
    ):
        with pytest.raises(CalmError, match=f"{name.replace('.', '[.]')} is not part of the model"):
            check(tensors | {name: np.ones(3)})


def test_a_head_beside_a_tied_one_must_be_the_embedding():
    family = Qwen2()
    config = family.decoder_config(SIZES | {"head_dim": 4, "tie_word_embeddings": True}, WHERE)
    (entry,) = [entry for entry in family.unused(config) if entry.matches("lm_head.weight")]
    assert (entry.must, entry.other) == ("same", "model.embed_tokens.weight")
    untied = dataclasses.replace(config, tied_head=False)
    assert not any(entry.matches("lm_head.weight") for entry in family.unused(untied))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "config.json: quantization_config is"),
        ({"architectures": ["MixtralForCausalLM"]}, "config.json says MixtralForCausalLM"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "config.json says Qwen3MoeForCausalLM"),
        ({"architectures": None, "model_type": None}, "config.json says no architecture"),
    ],
)
def test_other_models_end_with_their_name(tmp_path, change, message):
    shutil.copytree(GOLDEN / "qwen3", tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CalmError, match=message):
        calm_jax.convert(tmp_path / "model", tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("family", **BY_NAME)
def test_a_folder_is_converted_and_written_back_as_it_was(family, tmp_path):
    source, frozen, written = GOLDEN / family.name, tmp_path / "frozen", tmp_path / "written"
    calm_jax.convert(source, frozen)
    calm_jax.export(frozen, written)
    before, after = open_source(source), open_source(written)
    assert set(before.tensors) == set(after.tensors)
    for name, tensor in before.tensors.items():
        assert after.tensors[name].dtype == tensor.dtype
        assert after.tensors[name][...].tobytes() == tensor[...].tobytes(), name
    assert family.recognises(after)
    assert family.decoder_config(after.config, "") == family.decoder_config(before.config, "")
