"""GGUF files against transformers: its reading of the file, and the model that the file is of."""

import json
import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra [parity]")
transformers = pytest.importorskip("transformers", reason="needs the extra [parity]")

import gguf_files  # noqa: E402
import tiny_tokenizers  # noqa: E402
from gguf import GGMLQuantizationType as Kind  # noqa: E402

import calm_jax  # noqa: E402
from calm_jax.checkpoints.convert import verification  # noqa: E402
from calm_jax.errors import CalmError  # noqa: E402
from tests.parity.random_huggingface import logits_of, randomise  # noqa: E402
from tests.parity.test_tokenizers import CHATS, HARD, SPECIALS, real_text  # noqa: E402

TOLERANCE = 1e-4  # of the largest logit
SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}
# transformers takes every query of Gemma to be scaled by this, and layers by what is published.
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "num_attention_heads": 2}
GEMMA_3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LOCAL = {"sliding_window": 5}
CONFIGS = {
    "llama": lambda **own: transformers.LlamaConfig(**SIZES | own),
    "mistral": lambda **own: transformers.MistralConfig(**SIZES | own),
    "qwen2": lambda **own: transformers.Qwen2Config(**SIZES | own),
    "qwen3": lambda **own: transformers.Qwen3Config(**SIZES | {"head_dim": 128} | own),
    "gemma": lambda **own: transformers.GemmaConfig(**SIZES | own),
    "gemma2": lambda **own: transformers.Gemma2Config(**SIZES | GEMMA | LOCAL | own),
    "gemma3": lambda **own: transformers.Gemma3TextConfig(**SIZES | GEMMA | LOCAL | own),
}
# Of each: the family, what its config has of its own, how matrices are stored, and whether
# transformers reads all of it from the file; what it leaves out is said beside.
MODELS = {
    "llama": ("llama", {"rms_norm_eps": 1e-5}, Kind.F32, True),
    "llama_tied": ("llama", {"tie_word_embeddings": True}, Kind.F16, True),
    "llama_multi_query": ("llama", {"num_key_value_heads": 1}, Kind.Q8_0, True),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}, Kind.F32, False),
    "llama_scaled": ("llama", {"rope_parameters": LLAMA_3}, Kind.F32, False),  # rope_freqs
    "llama_linear": ("llama", {"rope_parameters": LINEAR}, Kind.F32, False),  # rope.scaling
    "mistral": ("mistral", {"sliding_window": None}, Kind.BF16, True),
    "mistral_window": ("mistral", LOCAL, Kind.F32, False),  # sliding_window of Llama's files
    "qwen2": ("qwen2", {}, Kind.Q8_0, True),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}, Kind.F16, True),
    "qwen3": ("qwen3", {}, Kind.Q8_0, True),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}, Kind.F32, False),
    "gemma": ("gemma", {"head_dim": 128}, Kind.F32, False),  # the whole architecture
    "gemma2": ("gemma2", {}, Kind.Q8_0, True),
    "gemma2_caps": (
        *("gemma2", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 7.0}),
        *(Kind.F16, False),
    ),
    "gemma3": ("gemma3", {"num_hidden_layers": 7, "rope_parameters": GEMMA_3_ROPE}, Kind.F32, True),
    "gemma3_scaled": (
        "gemma3",
        {
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 100,
            "rope_parameters": {**GEMMA_3_ROPE, "full_attention": LINEAR},
        },
        Kind.F32,
        False,
    ),
}


def difference(logits, reference):
    """Largest difference of logits over the largest logit."""
    return np.max(np.abs(np.asarray(logits) - reference)) / np.max(np.abs(reference))


def random_file(path, config, **options):
    """Writes a random model. Returns it with its tensors as the file has them."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model)
    tied = config.tie_word_embeddings
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    tensors = {n: x for n, x in tensors.items() if not (tied and n == "lm_head.weight")}
    gguf_files.write(path, config.to_dict(), tensors, **options)
    return model


def read_by_transformers(path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )


def converted(path):
    calm_jax.convert(path, path.parent / "converted")
    return calm_jax.load(path.parent / "converted")


@pytest.mark.parametrize("name", MODELS)
def test_logits(name, tmp_path):
    family, own, kind, whole = MODELS[name]
    path = tmp_path / "model.gguf"
    model = random_file(path, CONFIGS[family](**own), stored_as=kind)
    tokens = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, 48), dtype=np.int32)
    logits = converted(path)(tokens)
    if kind == Kind.F32:
        assert difference(logits, logits_of(model, tokens)) <= TOLERANCE
    if whole:
        assert difference(logits, logits_of(read_by_transformers(path), tokens)) <= TOLERANCE
    assert whole or kind in (Kind.F32, Kind.F16)


UNREAD = ("gemma", "mistral_window")  # by transformers


@pytest.mark.parametrize("name", ["llama", "llama_scaled", "gemma2_caps", "gemma3_scaled", *UNREAD])
def test_verified(name, tmp_path, caplog):
    """Also where transformers itself would read another config from the file."""
    family, own, kind, _ = MODELS[name]
    random_file(tmp_path / "model.gguf", CONFIGS[family](**own), stored_as=kind)
    with caplog.at_level(logging.INFO, "absl"):
        calm_jax.convert(tmp_path / "model.gguf", tmp_path / "model", verify=True)
    compared = json.loads((tmp_path / "model/verification.json").read_text())["compared_with"]
    if name in UNREAD:
        assert compared is None
        assert "does not read the file: " in caplog.text
    else:
        assert compared["difference"] <= TOLERANCE
        assert "Logits are those of transformers" in caplog.text


def test_a_wrong_conversion_is_found(tmp_path, monkeypatch):
    def wrong(described, **options):
        decoder = load_described(described, **options)
        scale = decoder.final_norm.scale
        scale[...] = scale[...].at[0].add(1.0)
        return decoder

    load_described = verification.load_described
    monkeypatch.setattr(verification, "load_described", wrong)
    random_file(tmp_path / "model.gguf", CONFIGS["llama"]())
    with pytest.raises(CalmError, match=r"model\.gguf: converted, its logits differ by"):
        calm_jax.convert(tmp_path / "model.gguf", tmp_path / "model", verify=True)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", gguf_files.KINDS, ids=lambda kind: kind.name)
def test_quantised(kind, tmp_path):
    path = tmp_path / "model.gguf"
    random_file(path, CONFIGS["llama"](), stored_as=kind)
    tokens = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, 48), dtype=np.int32)
    theirs = logits_of(read_by_transformers(path), tokens)
    assert difference(converted(path)(tokens), theirs) <= TOLERANCE


MODEL_OF = {"llama3": "llama", "qwen": "qwen2", "gemma": "gemma2", "mistral": "llama"}
PRE = {"llama3": "llama-bpe", "qwen": "qwen2"}
FLAGS = ({}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True})


@pytest.fixture(scope="module", params=MODEL_OF)
def tokenizer(request, tmp_path_factory):
    """(family, what a file says of its tokenizer)."""
    folder = tiny_tokenizers.FAMILIES[request.param](
        tmp_path_factory.mktemp("tokenizer"), tiny_tokenizers.TEXT + real_text()[::7], 1500
    )
    found = gguf_files.tokenizer_metadata(folder)
    if request.param in PRE:
        found["ggml.pre"] = PRE[request.param]
    return request.param, found


def with_tokenizer(path, family, metadata):
    """(our vocabulary, that of transformers) of a file with this tokenizer."""
    config = CONFIGS[MODEL_OF[family]](vocab_size=len(metadata["ggml.tokens"]), num_hidden_layers=1)
    random_file(path, config, tokenizer=metadata, stored_as=Kind.Q8_0)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return converted(path).vocabulary, theirs


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_tokenizers(tokenizer, flags, tmp_path):
    family, metadata = tokenizer
    metadata = metadata | {f"ggml.{key}": value for key, value in flags.items()}
    ours, theirs = with_tokenizer(tmp_path / "model.gguf", family, metadata)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    texts = [*HARD, *real_text()]
    for special in SPECIALS[family]:
        texts += [special, f"a{special}b", f" {special} x {special}{special}\n", f"{special} tail"]
    for text in texts:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids, repr(text)
        whole = theirs(text)["input_ids"]
        end = [theirs.eos_token_id] if flags.get("add_eos_token") else []
        if ids[:1] != [theirs.bos_token_id]:  # a text may bring the start token itself
            assert [*ours.encode_sequence(text), *end] == whole, repr(text)
        until = next((n for n, token in enumerate(ids) if token in ours.eos_ids), len(ids))
        assert ours.decode(ids) == theirs.decode(ids[:until], skip_special_tokens=True)


def test_chats(tokenizer, tmp_path):
    family, metadata = tokenizer
    ours, theirs = with_tokenizer(tmp_path / "model.gguf", family, metadata)
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        try:
            expected = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            with pytest.raises(ValueError, match=str(error)):
                ours.chat(messages)
        else:
            assert ours.chat(messages) == expected


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_exported_tokenizers_are_read_alike(tokenizer, flags, tmp_path):
    """With start and end tokens: what tokenizer.json and tokenizer_config.json say together."""
    family, metadata = tokenizer
    metadata = metadata | {f"ggml.{key}": value for key, value in flags.items()}
    ours, theirs = with_tokenizer(tmp_path / "model.gguf", family, metadata)
    ours.save_published(tmp_path / "exported")
    copy = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    for text in HARD:
        assert copy(text)["input_ids"] == theirs(text)["input_ids"], repr(text)
    written = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [theirs.eos_token_id]
