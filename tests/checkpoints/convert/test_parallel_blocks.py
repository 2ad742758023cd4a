"""GPT-J, Falcon and Cohere of transformers: parallel blocks, plain LayerNorms, partial rotary."""

import json
import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import calm_jax
from calm_jax import DecoderConfig
from calm_jax.checkpoints.convert.cohere import Cohere
from calm_jax.checkpoints.convert.falcon import Falcon
from calm_jax.checkpoints.convert.gptj import GptJ
from calm_jax.checkpoints.convert.table import check_names, check_shapes, sizes
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.errors import CalmError
from calm_jax.models.config import RopeScaling
from tests.converting import decoder_in_memory

WHERE = "model/config.json"
GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = {family.name: family for family in (GptJ(), Falcon(), Cohere())}
POSITIVE = st.floats(1e-3, 1e7)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_transformers(name):
    """The outputs are by tests/parity/make_golden.py."""
    source = open_source(GOLDEN / name)
    assert [known for known in FAMILIES if FAMILIES[known].recognises(source)] == [name]
    with np.load(GOLDEN / name / "logits.npz") as golden:
        logits = np.asarray(decoder_in_memory(FAMILIES[name], source)(golden["tokens"]))
        difference = np.max(np.abs(logits - golden["logits"]))
        assert difference <= 4e-6 * np.max(np.abs(golden["logits"]))


@st.composite
def configs(draw, name):
    """Forms that the family can express."""
    heads, head_dim = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 4))
    fields = {
        "vocab_size": draw(st.integers(1, 40)),
        "embed_dim": heads * head_dim,
        "num_layers": draw(st.integers(1, 5)),
        "num_heads": heads,
        "head_dim": head_dim,
        "mlp_dim": draw(st.integers(1, 40)),
        "block": "parallel",
        "norm": "layer",
        "norm_eps": draw(POSITIVE),
        "activation": draw(st.sampled_from(["silu", "gelu", "gelu_tanh"])),
    }
    bias, scaling = draw(st.booleans()), RopeScaling("linear", draw(POSITIVE))
    rope = {"rope_base": draw(POSITIVE), "rope_scaling": draw(st.sampled_from([None, scaling]))}
    own = {
        "gptj": {
            "num_kv_heads": heads,
            "gated_mlp": False,
            "norm_bias": True,
            "mlp_bias": True,
            "head_bias": True,
            "rope": "interleaved",
            "rope_dim": 2 * draw(st.integers(1, head_dim // 2)),
            "tied_head": False,
        },
        "falcon": {
            "num_kv_heads": 1,
            "gated_mlp": False,
            "norm_bias": True,
            "tied_head": draw(st.booleans()),
            **rope,
        },
        "cohere": {
            "num_kv_heads": draw(st.sampled_from([1, heads])),
            "rope": "interleaved",
            "logit_scale": draw(POSITIVE),
            "attention_bias": bias,
            "output_bias": bias,
            "tied_head": draw(st.booleans()),
            **rope,
        },
    }
    return DecoderConfig(**fields, **own[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_config_json_is_read_back_as_it_was(name):
    @hypothesis.given(configs(name))
    @hypothesis.settings(max_examples=150)
    def check(config):
        values = json.loads(json.dumps(FAMILIES[name].huggingface_config(config)))
        assert FAMILIES[name].decoder_config(values, WHERE) == config
        # Every tensor has a shape.
        family = FAMILIES[name]
        tensors = {
            tensor: np.empty(rule.source_shape(sizes(config)), np.int8)
            for rule in family.rules(config)
            for tensor in rule.names(config.num_layers)
        }
        check_names(family.rules(config), (), config.num_layers, tensors, WHERE)
        check_shapes(family.rules(config), config, tensors, WHERE)

    check()


def test_absent_keys_mean_what_they_mean_to_transformers():
    sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    found = {
        name: [
            getattr(family.decoder_config({}, WHERE), field)
            for field in (*sizes, "mlp_dim", "activation", "tied_head", "rope_dim", "rope_base")
        ]
        for name, family in FAMILIES.items()
    }
    assert found == {
        "gptj": [50_400, 4096, 28, 16, 16, 256, 16_384, "gelu_tanh", False, 64, 1e4],
        "falcon": [65_024, 4544, 32, 71, 1, 64, 18_176, "gelu", True, None, 1e4],
        "cohere": [256_000, 8192, 40, 64, 64, 128, 22_528, "silu", True, None, 5e5],
    }
    assert FAMILIES["cohere"].decoder_config({}, WHERE).logit_scale == 0.0625


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("gptj", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("gptj", {"rotary_dim": None}, "rotary_dim is None"),
        ("gptj", {"rotary_dim": 7}, "7 rotated features"),
        ("gptj", {"n_embd": 4097}, "n_embd 4097 is not a multiple of n_head 16"),
        ("gptj", {"n_layer": "28"}, "n_layer is '28'"),
        ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("falcon", {"new_decoder_architecture": True}, "new_decoder_architecture is True"),
        ("falcon", {"alibi": True}, "alibi is True"),
        ("falcon", {"multi_query": False}, "multi_query is False"),
        ("falcon", {"parallel_attn": False}, "parallel_attn is False"),
        ("falcon", {"bias": True}, "bias is True"),
        ("falcon", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "type is 'dynamic'"),
        ("falcon", {"hidden_size": 4545}, "4545 is not a multiple of num_attention_heads 71"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm is True"),
        ("cohere", {"logit_scale": 0}, "logit_scale is 0"),
        ("cohere", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ("cohere", {"num_key_value_heads": 7}, "num_heads 64 is not a multiple of num_kv_heads 7"),
    ],
)
def test_what_is_wrong_or_not_supported_is_named(name, values, message):
    with pytest.raises(CalmError, match=message):
        FAMILIES[name].decoder_config(values, WHERE)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_is_converted_and_written_back_as_it_was(name, tmp_path):
    calm_jax.convert(GOLDEN / name, tmp_path / "model")
    calm_jax.export(tmp_path / "model", tmp_path / "exported")
    was, now = (
        load_file(folder / "model.safetensors") for folder in (GOLDEN / name, tmp_path / "exported")
    )
    assert {k: v.tobytes() for k, v in was.items()} == {k: v.tobytes() for k, v in now.items()}
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["architectures"] == [FAMILIES[name].architectures[0]]


def test_buffers_of_older_files_say_nothing(tmp_path):
    tensors = load_file(GOLDEN / "gptj" / "model.safetensors")
    for layer in range(3):
        tensors[f"transformer.h.{layer}.attn.bias"] = np.ones((1, 1, 8, 8), np.uint8)
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = np.array(-1e9, np.float32)
    (tmp_path / "old").mkdir()
    save_file(tensors, tmp_path / "old" / "model.safetensors")
    config = (GOLDEN / "gptj" / "config.json").read_text()
    (tmp_path / "old" / "config.json").write_text(config)
    calm_jax.convert(tmp_path / "old", tmp_path / "model")
    calm_jax.convert(GOLDEN / "gptj", tmp_path / "other")
    fingerprints = {calm_jax.load(tmp_path / x).fingerprint for x in ("model", "other")}
    assert len(fingerprints) == 1
