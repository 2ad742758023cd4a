"""Llama, Mistral, Qwen 2 and 3 against transformers itself, on random models that hide nothing."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra [parity]")
transformers = pytest.importorskip("transformers", reason="needs the extra [parity]")

from calm_jax.checkpoints.convert.huggingface_config import GLOBAL, LOCAL  # noqa: E402
from calm_jax.checkpoints.convert.llama import Llama, Mistral, Qwen2, Qwen3  # noqa: E402
from calm_jax.checkpoints.sources.opening import open_source  # noqa: E402
from tests.converting import decoder_in_memory  # noqa: E402
from tests.parity.random_huggingface import logits_of, save_random  # noqa: E402

TOLERANCE = 1e-4  # of the largest logit
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
MIXED = [LOCAL, GLOBAL, LOCAL, LOCAL]
# Family, what its config has besides SIZES, and how it is saved.
MODELS = {
    "llama": ("llama", {}, {}),
    "llama_multi_head": ("llama", {"num_key_value_heads": None, "rms_norm_eps": 1e-5}, {}),
    "llama_multi_query": ("llama", {"num_key_value_heads": 1, "head_dim": 16}, {}),
    "llama_scaled": ("llama", {"rope_parameters": LLAMA_3, "head_dim": 16}, {}),
    "llama_linear": ("llama", {"rope_parameters": LINEAR}, {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}, {}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama_gelu": ("llama", {"hidden_act": "gelu"}, {}),
    "llama_sharded": ("llama", {}, {"max_shard_size": "60KB"}),
    "llama_rounded": ("llama", {}, {"max_shard_size": "60KB", "dtype": torch.bfloat16}),
    "mistral": ("mistral", {"sliding_window": 4, "head_dim": 16}, {}),
    "mistral_global": ("mistral", {"sliding_window": None}, {}),
    "mistral_tied": ("mistral", {"sliding_window": 7, "tie_word_embeddings": True}, {}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {}),
    "qwen2_windows": ("qwen2", WINDOWS, {}),
    "qwen2_mixed": ("qwen2", {**WINDOWS, "layer_types": MIXED}, {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}, {"max_shard_size": "60KB"}),
    "qwen3": ("qwen3", {"head_dim": 16}, {}),
    "qwen3_tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}, {}),
    "qwen3_windows": ("qwen3", {**WINDOWS, "head_dim": 16, "attention_bias": True}, {}),
}
FAMILIES = {family.name: family for family in (Llama(), Mistral(), Qwen2(), Qwen3())}
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(family, folder, tokens [B, T], transformers' logits [B, T, V]) of a model by its name."""
    found = {}

    def get(name):
        if name not in found:
            family, fields, save_options = MODELS[name]
            folder = tmp_path_factory.mktemp(name)
            config = CONFIGS[family](**SIZES | fields)
            found[name] = (FAMILIES[family], folder, *save_random(config, folder, **save_options))
        return found[name]

    return get


def difference(logits, reference):
    """Largest difference of logits over the largest logit."""
    return np.max(np.abs(np.asarray(logits) - reference)) / np.max(np.abs(reference))


def load_theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.mark.parametrize("name", MODELS)
def test_logits(name, saved):
    family, folder, tokens, logits = saved(name)
    source = open_source(folder)
    assert [known for known in FAMILIES.values() if known.recognises(source)] == [family]
    assert difference(decoder_in_memory(family, source)(tokens), logits) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama_sharded", "llama_rounded", "qwen2_tied"])
def test_shards_hold_every_bit(name, saved):
    _, folder, _, _ = saved(name)
    assert len(list(folder.glob("*.safetensors"))) > 1
    tensors = open_source(folder).tensors
    theirs = load_theirs(folder).state_dict()
    assert set(tensors) <= set(theirs)
    for name, tensor in tensors.items():
        assert np.array_equal(tensor[...].astype(np.float32), theirs[name].numpy()), name


def old_spelling(values):
    """config.json as transformers 4 wrote it."""
    values = dict(values)
    rope = dict(values.pop("rope_parameters"))
    values["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    # The first Llamas with scaling had "type", Llama 3.1 has "rope_type".
    key = "type" if kind == "linear" else "rope_type"
    values["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    values["torch_dtype"] = values.pop("dtype")
    if values.pop("layer_types", None) is not None and not values["use_sliding_window"]:
        values["sliding_window"] = 4  # as in the files of Qwen 2.5, where it means nothing
    return values


@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen2_mixed"])
def test_old_spellings_of_the_config(name, saved, tmp_path):
    """With such a file, transformers and we compute what we did before."""
    family, folder, tokens, logits = saved(name)
    values = json.loads((folder / "config.json").read_text())
    old = old_spelling(values)
    assert family.decoder_config(old, "old") == family.decoder_config(values, "new")
    link_weights(folder, tmp_path, old)
    assert difference(logits_of(load_theirs(tmp_path), tokens), logits) <= 1e-6
    assert difference(decoder_in_memory(family, open_source(tmp_path))(tokens), logits) <= TOLERANCE


def link_weights(folder, other, values):
    """The same weights with another config.json."""
    for file in folder.glob("*.safetensors*"):
        (other / file.name).symlink_to(file)
    (other / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name", MODELS)
def test_the_config_that_is_written_is_transformers_own(name, saved, tmp_path):
    """With it in place of the original, transformers computes the same from the same weights."""
    family, folder, tokens, logits = saved(name)
    config = family.read(open_source(folder)).config
    link_weights(folder, tmp_path, family.huggingface_config(config))
    assert difference(logits_of(load_theirs(tmp_path), tokens), logits) <= 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_absent_keys_mean_what_they_mean_to_transformers(name):
    """Checked on the config that transformers writes out for an empty one."""
    family = FAMILIES[name]
    whole = json.loads(CONFIGS[name]().to_json_string(use_diff=False))
    assert family.decoder_config({}, "empty") == family.decoder_config(whole, "whole")


class Wrong:
    """A family whose reading is changed."""

    def __init__(self, family, change):
        self.family, self.change = family, change

    def read(self, source):
        return self.change(self.family.read(source))


def config(**fields):
    return lambda reading: dataclasses.replace(
        reading, config=dataclasses.replace(reading.config, **fields)
    )


def exchanged(first, second):
    """Each of two tensors stands in the other's place in every layer."""

    def change(reading):
        tensors = dict(reading.tensors)
        for name in reading.tensors:
            if f".{first}." in name:
                other = name.replace(first, second)
                tensors[name], tensors[other] = tensors[other], tensors[name]
        return dataclasses.replace(reading, tensors=tensors)

    return change


def without_biases(ending):
    """Biases of some matrices are zero."""

    def change(reading):
        tensors = {
            name: np.zeros(tensor.shape, tensor.dtype) if name.endswith(ending) else tensor
            for name, tensor in reading.tensors.items()
        }
        return dataclasses.replace(reading, tensors=tensors)

    return change


TRAPS = {
    "norm offset": ("llama", config(norm_offset=1.0)),
    "norms": ("llama", exchanged("input_layernorm", "post_attention_layernorm")),
    "norm eps": ("llama_multi_head", config(norm_eps=1e-2)),
    "activation": ("llama", config(activation="gelu")),
    "forms of gelu": ("llama_gelu", config(activation="gelu_tanh")),
    "gate and up": ("llama", exchanged("gate_proj", "up_proj")),
    "rotary style": ("llama", config(rope="interleaved")),
    "rotary base": ("llama", config(rope_base=5e5)),
    "no scaling": ("llama_scaled", config(rope_scaling=None)),
    "no linear scaling": ("llama_linear", config(rope_scaling=None)),
    "linear for llama3": (
        "llama_scaled",
        lambda reading: config(
            rope_scaling=dataclasses.replace(reading.config.rope_scaling, kind="linear")
        )(reading),
    ),
    "blend of llama3": (
        "llama_scaled",
        lambda reading: config(
            rope_scaling=dataclasses.replace(
                reading.config.rope_scaling, high_frequency_factor=1.001
            )
        )(reading),
    ),
    "bias of queries": ("qwen2", without_biases("q_proj.bias")),
    "bias of values": ("qwen2", without_biases("v_proj.bias")),
    "bias of outputs": ("llama_biases", without_biases("o_proj.bias")),
    "biases of the MLP": ("llama_biases", without_biases("up_proj.bias")),
    "window by one": ("mistral", config(window=5)),
    "no window": ("mistral", config(window=None)),
    "window on every layer": ("qwen2_windows", config(window_pattern=(True,))),
    "which layers": ("qwen2_mixed", config(window_pattern=(False, True, True, True))),
    "windows of Qwen 3": ("qwen3_windows", config(window=None)),
    "head norms": ("qwen3", exchanged("q_norm", "k_norm")),
    "query scale": ("qwen3", config(query_scale=8**-0.5)),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_is_seen_in_the_logits(trap, saved):
    name, change = TRAPS[trap]
    family, folder, tokens, logits = saved(name)
    decoder = decoder_in_memory(Wrong(family, change), open_source(folder))
    assert difference(decoder(tokens), logits) > 5 * TOLERANCE
