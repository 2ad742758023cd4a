"""GPT-J, Falcon and Cohere against transformers itself, on random models that hide nothing."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra [parity]")
transformers = pytest.importorskip("transformers", reason="needs the extra [parity]")

import calm_jax  # noqa: E402
from calm_jax.checkpoints.convert.registry import FAMILIES  # noqa: E402
from calm_jax.checkpoints.sources.opening import open_source  # noqa: E402
from calm_jax.errors import CalmError  # noqa: E402
from tests.converting import decoder_in_memory  # noqa: E402
from tests.parity.random_huggingface import logits_of, save_random  # noqa: E402

TOLERANCE = 4e-6  # of the largest logit; 1e-4 would not tell one form of gelu from the other
GPT_J = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
FALCON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
COHERE = {**FALCON, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
LINEAR = {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}
MODELS = {
    "gptj": lambda: transformers.GPTJConfig(**GPT_J, rotary_dim=4),
    "gptj_all_rotary": lambda: transformers.GPTJConfig(**GPT_J, rotary_dim=8, n_inner=40),
    "gptj_gelu": lambda: transformers.GPTJConfig(**GPT_J, rotary_dim=4, activation_function="gelu"),
    "falcon": lambda: transformers.FalconConfig(**FALCON),
    "falcon_own_head": lambda: transformers.FalconConfig(
        **FALCON, ffn_hidden_size=40, tie_word_embeddings=False
    ),
    "cohere": lambda: transformers.CohereConfig(**COHERE),
    "cohere_biases": lambda: transformers.CohereConfig(
        **COHERE, attention_bias=True, logit_scale=0.5
    ),
    "falcon_stretched": lambda: transformers.FalconConfig(**FALCON, rope_parameters=LINEAR),
    "cohere_stretched": lambda: transformers.CohereConfig(
        **COHERE, head_dim=16, rope_parameters=LINEAR
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Model name -> (folder, tokens, logits)."""
    found = {}
    for name, config in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        found[name] = (folder, *save_random(config(), folder))
    return found


def difference(folder, tokens, logits, **changes) -> float:
    """Of the largest logit, with fields of the form changed."""
    source = open_source(folder)
    (family,) = (family for family in FAMILIES.values() if family.recognises(source))
    reading = family.read(source)
    changed = dataclasses.replace(reading, config=dataclasses.replace(reading.config, **changes))
    decoder = decoder_in_memory(types.SimpleNamespace(read=lambda _: changed), source)
    return float(np.max(np.abs(np.asarray(decoder(tokens)) - logits)) / np.max(np.abs(logits)))


@pytest.mark.parametrize("name", MODELS)
def test_logits(name, saved):
    assert difference(*saved[name]) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gptj", {"rope": "half"}),
        ("gptj", {"rope_dim": 8}),
        ("gptj", {"activation": "gelu"}),
        ("gptj", {"norm_eps": 1e-3}),
        ("falcon", {"rope": "interleaved"}),
        ("falcon", {"activation": "gelu_tanh"}),
        ("falcon", {"norm": "rms"}),
        ("cohere", {"rope": "half"}),
        ("cohere", {"logit_scale": 1.0}),
        ("cohere", {"norm": "rms"}),
        ("cohere", {"rope_base": 1e5}),
        ("falcon_stretched", {"rope_scaling": None}),
        ("cohere_stretched", {"rope_scaling": None}),
    ],
)
def test_every_trap_is_seen_in_the_logits(name, wrong, saved):
    assert difference(*saved[name], **wrong) > 4 * TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_converted_and_exported(name, saved, tmp_path):
    folder, tokens, _ = saved[name]
    calm_jax.convert(folder, tmp_path / "model", verify=True)
    calm_jax.export(tmp_path / "model", tmp_path / "exported")
    was, now = (
        transformers.AutoModelForCausalLM.from_pretrained(str(path))
        for path in (folder, tmp_path / "exported")
    )
    assert was.state_dict().keys() == now.state_dict().keys()
    for one, other in zip(was.state_dict().values(), now.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    # GPT-J's gelu_new and gelu_pytorch_tanh are one function, rounded in two ways.
    expected = logits_of(was, tokens)
    gap = np.max(np.abs(logits_of(now, tokens) - expected))
    assert gap <= TOLERANCE * np.max(np.abs(expected))


@pytest.mark.parametrize("own", [{}, {"n_head": 4}])
def test_sizes_of_gptj_by_their_other_names(own, saved, tmp_path):
    folder, _, _ = saved["gptj"]
    shutil.copytree(folder, tmp_path / "source")
    values = json.loads((folder / "config.json").read_text())
    del values["n_head"]
    values |= own | {"num_attention_heads": 8}
    (tmp_path / "source" / "config.json").write_text(json.dumps(values))
    calm_jax.convert(tmp_path / "source", tmp_path / "model", verify=True)
    assert calm_jax.load(tmp_path / "model").config.num_heads == 8


def test_prompts_that_transformers_does_not_take(tmp_path):
    config = transformers.GPTJConfig(**GPT_J | {"n_positions": 32}, rotary_dim=4)
    transformers.GPTJForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(CalmError, match=r"transformers \S+ cannot run it: (Runtime|Index)Error"):
        calm_jax.convert(tmp_path / "source", tmp_path / "model", verify=True)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "config",
    [transformers.GPTJConfig, transformers.FalconConfig, transformers.CohereConfig],
    ids=lambda config: config.model_type,
)
def test_absent_keys_mean_what_they_mean_to_transformers(config):
    """Checked on the config that transformers writes out for an empty one."""
    family = FAMILIES[config.model_type]
    whole = json.loads(config().to_json_string(use_diff=False))
    assert family.decoder_config({}, "empty") == family.decoder_config(whole, "whole")


@pytest.mark.parametrize("name", ["falcon_stretched", "cohere_stretched"])
def test_old_spellings_of_the_config(name, saved, tmp_path):
    """With such a file, transformers and we compute what we did before."""
    folder, tokens, logits = saved[name]
    values = json.loads((folder / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope["rope_theta"]
    values["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    values["torch_dtype"] = values.pop("dtype")
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    assert np.max(np.abs(logits_of(theirs, tokens) - logits)) <= 1e-6 * np.max(np.abs(logits))
    assert difference(tmp_path, tokens, logits) <= TOLERANCE
