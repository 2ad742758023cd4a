"""Gemma 1, 2 and 3 against transformers itself, on random models that hide nothing."""

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra [parity]")
transformers = pytest.importorskip("transformers", reason="needs the extra [parity]")

from converting import decoder_in_memory  # noqa: E402
from parity.make_golden import EYE  # noqa: E402
from parity.random_huggingface import save_random  # noqa: E402

import calm_jax  # noqa: E402
from calm_jax.checkpoints.convert.gemma import Gemma, Gemma2, Gemma3  # noqa: E402
from calm_jax.checkpoints.convert.huggingface_config import GLOBAL, LOCAL  # noqa: E402
from calm_jax.checkpoints.sources.opening import open_source  # noqa: E402

# Of the largest logit. The exact gelu in place of the tanh form changes 6e-5 of it.
TOLERANCE, SEEN = 4e-6, 4e-5
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
LOCALS = {"sliding_window": 4, "query_pre_attn_scalar": 24}
ROPES = {
    GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    LOCAL: {"rope_type": "default", "rope_theta": 1e4},
}
TEXT_3 = {**SIZES, **LOCALS, "num_hidden_layers": 8, "rope_parameters": ROPES}


def seeing_config():
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT_3),
        vision_config=transformers.SiglipVisionConfig(**EYE),
        mm_tokens_per_image=4,
        boi_token_index=1,
        eoi_token_index=2,
        image_token_index=0,
    )


MODELS = {
    "gemma": (
        Gemma(),
        lambda: transformers.GemmaConfig(**SIZES, num_hidden_layers=2),
    ),
    "gemma_untied": (
        Gemma(),
        lambda: transformers.GemmaConfig(**SIZES, num_hidden_layers=1, tie_word_embeddings=False),
    ),
    "gemma2": (
        Gemma2(),
        lambda: transformers.Gemma2Config(
            **SIZES, **LOCALS, num_hidden_layers=3, attn_logit_softcapping=5.0
        ),
    ),
    "gemma3": (Gemma3(), lambda: transformers.Gemma3TextConfig(**TEXT_3)),
    "gemma3_seeing": (Gemma3(), seeing_config),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(family, folder, tokens [B, T], transformers' logits [B, T, V]) of a model by its name."""
    found = {}

    def get(name):
        if name not in found:
            family, make_config = MODELS[name]
            folder = tmp_path_factory.mktemp(name)
            found[name] = (family, folder, *save_random(make_config(), folder))
        return found[name]

    return get


def difference(decoder, tokens, logits):
    """Largest difference of logits over the largest logit."""
    return np.max(np.abs(np.asarray(decoder(tokens)) - logits)) / np.max(np.abs(logits))


@pytest.mark.parametrize("name", MODELS)
def test_logits(name, saved):
    family, folder, tokens, logits = saved(name)
    source = open_source(folder)
    assert family.recognises(source)
    assert difference(decoder_in_memory(family, source), tokens, logits) <= TOLERANCE


def old_spelling(values):
    """config.json as transformers 4 wrote it."""
    values = dict(values)
    if "text_config" in values:
        return values | {"text_config": old_spelling(values["text_config"])}
    rope = values.pop("rope_parameters")
    whole = rope.get(GLOBAL, rope)
    values["rope_theta"] = whole["rope_theta"]
    scaling = {"type": "linear", "factor": whole["factor"]} if "factor" in whole else None
    values["rope_scaling"] = scaling
    if LOCAL in rope:
        values["rope_local_base_freq"] = rope[LOCAL]["rope_theta"]
        values["sliding_window_pattern"] = 6
    for key in ("layer_types", "_sliding_window_pattern"):
        values.pop(key, None)
    if values.get("tie_word_embeddings"):
        del values["tie_word_embeddings"]
    if values["model_type"] == "gemma":
        values["hidden_act"] = "gelu"
    values["torch_dtype"] = values.pop("dtype", "float32")
    return values


@pytest.mark.parametrize("name", MODELS)
def test_old_spellings_of_the_config_say_the_same(name, saved):
    family, folder, _, _ = saved(name)
    values = json.loads((folder / "config.json").read_text())
    old = old_spelling(values)
    assert "rope_parameters" not in json.dumps(old)
    assert family.decoder_config(old, "old") == family.decoder_config(values, "new")


@pytest.mark.parametrize("name", ["gemma", "gemma_untied", "gemma2", "gemma3"])
def test_the_config_that_is_written_is_transformers_own(name, saved, tmp_path):
    """With it in place of the original, transformers computes the same from the same weights."""
    import torch

    family, folder, tokens, logits = saved(name)
    config = family.read(open_source(folder)).config
    (tmp_path / "config.json").write_text(json.dumps(family.huggingface_config(config)))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    assert np.max(np.abs(theirs - logits)) <= 1e-6 * np.max(np.abs(logits))


@pytest.mark.parametrize("name", MODELS)
def test_converted_and_exported_it_is_the_same_model_to_transformers(name, saved, tmp_path):
    import torch

    family, folder, tokens, logits = saved(name)
    calm_jax.convert(folder, tmp_path / "frozen")
    calm_jax.export(tmp_path / "frozen", tmp_path / "exported")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", attn_implementation="eager"
    )
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    assert np.max(np.abs(theirs - logits)) <= 1e-6 * np.max(np.abs(logits))
    source = open_source(folder)
    reading, exported = family.read(source), model.state_dict()
    names = [n for rule in reading.rules for n in rule.names(reading.config.num_layers)]
    for name in names:
        assert np.array_equal(reading.tensors[name][...], exported[name].numpy())


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


EVERYWHERE = {
    "norm offset": config(norm_offset=0.0),
    "embedding scale": config(embed_scale=1.0),
    "activation": config(activation="gelu"),
    "rotary style": config(rope="interleaved"),
    "rotary base": config(rope_base=5e4),
    "gate and up": exchanged("gate_proj", "up_proj"),
}
LATER = {
    "query scale": config(query_scale=None),
    "window by one": config(window=5),
    "no window": config(window=None, local_rope_base=None),
    "global and local": config(window_pattern=(False, True)),
    "norm before and after": exchanged("post_attention_layernorm", "pre_feedforward_layernorm"),
    "norms after": exchanged("post_attention_layernorm", "post_feedforward_layernorm"),
}
TRAPS = {
    "gemma": EVERYWHERE | {"two norms": exchanged("input_layernorm", "post_attention_layernorm")},
    "gemma2": EVERYWHERE
    | LATER
    | {
        "attention cap": config(attention_logit_cap=None),
        "final cap": config(final_logit_cap=None),
    },
    "gemma3": EVERYWHERE
    | LATER
    | {
        "local rotary base": config(local_rope_base=None),
        "rotary scaling": config(rope_scaling=None),
        "pattern of the depth": config(window_pattern=(True,) * 7 + (False,)),
        "head norms": exchanged("q_norm", "k_norm"),
    },
}


@pytest.mark.parametrize(
    ("name", "trap"), [(name, trap) for name, traps in TRAPS.items() for trap in traps]
)
def test_every_trap_is_seen_in_the_logits(name, trap, saved):
    family, folder, tokens, logits = saved(name)
    decoder = decoder_in_memory(Wrong(family, TRAPS[name][trap]), open_source(folder))
    assert difference(decoder, tokens, logits) > SEEN
