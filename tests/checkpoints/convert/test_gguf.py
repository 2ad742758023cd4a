"""GGUF files of every family: committed outputs of transformers, and what is refused."""

import json
import pathlib

import gguf_files
import hypothesis
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import strategies as st
from quantized_models import flat, stood_for
from safetensors.numpy import load_file

import calm_jax
from calm_jax.checkpoints.convert.gguf_model import as_published
from calm_jax.checkpoints.convert.gguf_tokenizer import tokenizer_files
from calm_jax.checkpoints.convert.registry import find_family
from calm_jax.checkpoints.convert.table import check_names, check_shapes, sizes
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.data.vocabularies import vocabulary_of_folder
from calm_jax.errors import CalmError
from calm_jax.models.config import RopeScaling
from calm_jax.models.parameters import module_tree
from tests.converting import decoder_in_memory

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3")
TOKENIZERS = ("llama3", "qwen", "gemma", "mistral")


def write(path, family, own=None, **options):
    """Writes the committed model of a family."""
    config = json.loads((GOLDEN / family / "config.json").read_text()) | (own or {})
    tensors = load_file(GOLDEN / family / "model.safetensors")
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    gguf_files.write(path, config, tensors, **options)
    return config


def opened(path):
    """(family, source) as the conversion has them."""
    source = as_published(open_source(path))
    return find_family(source), source


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_transformers(name, kind, tmp_path):
    """Weights of the committed models are bfloat16; their outputs are by make_golden.py."""
    write(tmp_path / "m.gguf", name, stored_as=kind)
    family, source = opened(tmp_path / "m.gguf")
    assert family.name == name
    with np.load(GOLDEN / name / "logits.npz") as golden:
        logits = np.asarray(decoder_in_memory(family, source)(golden["tokens"]))
        difference = np.max(np.abs(logits - golden["logits"]))
        assert difference <= 1e-5 * np.max(np.abs(golden["logits"]))


@pytest.mark.parametrize("name", [*FAMILIES, "qwen2"])
def test_the_same_model_as_from_its_folder(name, tmp_path):
    """Form and tensors are those that transformers' own folder gives."""
    own = {"use_sliding_window": False} if name == "qwen2" else {}
    own |= {"layer_types": None} if name == "qwen2" else {}
    config = write(tmp_path / "m.gguf", name, own)
    family, source = opened(tmp_path / "m.gguf")
    expected = family.decoder_config(config, "config.json")
    assert family.read(source).config == expected
    published = load_file(GOLDEN / name / "model.safetensors")
    assert source.tensors.keys() == published.keys()
    for key, x in published.items():
        # Gemma's norms have lost bits to the 1 that was added.
        atol = 1e-6 if name.startswith("gemma") else 0
        np.testing.assert_allclose(source.tensors[key][...], x.astype(np.float32), 0, atol, True)


def test_sizes_that_a_file_leaves_out(tmp_path):
    """As older files do: a head's width, the vocabulary's size, key heads."""
    dropped = ("attention.key_length", "attention.value_length", "vocab_size", "rope.freq_base")
    extra = {f"llama.{key}": None for key in dropped}
    own = {"head_dim": 8, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    own |= {"vocab_size": 48, "num_hidden_layers": 1, "intermediate_size": 24}
    config = json.loads((GOLDEN / "llama" / "config.json").read_text()) | own
    shapes = {"q_proj": (32, 32), "k_proj": (32, 32), "v_proj": (32, 32), "o_proj": (32, 32)}
    tensors = {f"model.layers.0.self_attn.{k}.weight": np.ones(v) for k, v in shapes.items()}
    for name, shape in {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}.items():
        tensors[f"model.layers.0.mlp.{name}.weight"] = np.ones(shape)
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        tensors[f"model.{name}.weight"] = np.ones(32)
    tensors["model.embed_tokens.weight"] = np.ones((48, 32))
    extra["llama.attention.head_count_kv"] = None
    gguf_files.write(tmp_path / "m.gguf", config, tensors, extra=extra)
    family, source = opened(tmp_path / "m.gguf")
    config = family.read(source).config
    assert (config.head_dim, config.vocab_size, config.num_kv_heads, config.rope_base) == (
        8,
        48,
        4,
        1e4,
    )
    assert config.tied_head and not config.attention_bias
    check_shapes(family.rules(config), config, source.tensors, "m")


LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("width", "factor", "high", "length"),
    [(128, 8.0, 4.0, 8192), (64, 32.0, 4.0, 8192), (64, 4.0, 8.0, 2048)],
)
def test_scaling_of_llama_3(width, factor, high, length, tmp_path):
    """Its published parameters come back from the factors of the frequencies."""
    rope = {"factor": factor, "high_freq_factor": high, "original_max_position_embeddings": length}
    own = {"rope_parameters": {**LLAMA_3, **rope}, "head_dim": width}
    write(tmp_path / "m.gguf", "llama", own)
    source = as_published(open_source(tmp_path / "m.gguf"))
    family = find_family(source)
    config = family.decoder_config(source.config, "m")
    assert config.rope_scaling == RopeScaling("llama3", factor, 1.0, high, length)


@pytest.mark.parametrize(
    ("name", "extra", "expected"),
    [
        ("gemma2", {"attention.sliding_window": None}, {"window": 4096}),
        ("gemma2", {"attn_logit_softcapping": None}, {"attention_logit_cap": 50.0}),
        ("gemma2", {"attention.scale": None}, {"query_scale": 8**-0.5}),
        (
            "gemma3",
            {"attention.sliding_window_pattern": 3},
            {"window_pattern": (True, True, False)},
        ),
        (
            "gemma3",
            {"attention.sliding_window_pattern": [True, False, True, False, True, False, True]},
            {"window_pattern": (True, False)},
        ),
        ("gemma3", {"rope.freq_base_swa": 5e3}, {"local_rope_base": 5e3}),
        ("gemma3", {"rope.scaling.type": "none"}, {"rope_scaling": None}),
        ("qwen3", {"rope.scale_linear": 2.0}, {"rope_scaling": RopeScaling("linear", 2.0)}),
        ("qwen3", {"expert_count": 0}, {}),
    ],
    ids=str,
)
def test_keys(name, extra, expected, tmp_path):
    extra = {f"{name}.{key}": value for key, value in extra.items()}
    write(tmp_path / "m.gguf", name, extra=extra)
    family, source = opened(tmp_path / "m.gguf")
    config = family.read(source).config
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "extra", "pattern"),
    [
        ("llama", {"general.architecture": "phi3"}, "general.architecture is 'phi3'; supported"),
        ("llama", {"general.type": "adapter"}, "general.type is 'adapter'"),
        ("llama", {"split.count": 3}, "split.count is 3"),
        ("llama", {"llama.block_count": None}, "llama.block_count is missing"),
        ("llama", {"llama.block_count": 5}, "tensor blk.4.attn_norm.weight is missing"),
        ("llama", {"llama.expert_count": 8}, "llama.expert_count is 8"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ("llama", {"llama.rope.scaling.factor": 2.0}, "both rope_freqs.weight and llama.rope"),
        ("llama", {"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4"),
        ("llama", {"llama.attention.value_length": 4}, "llama.attention.value_length is 4"),
        ("llama", {"llama.attention.causal": False}, "llama.attention.causal is False"),
        ("llama", {"llama.attention.head_count": 0}, "llama.attention.head_count is 0"),
        ("llama", {"llama.attention.head_count_kv": [2, 1, 2]}, "head_count_kv is .2, 1, 2"),
        ("llama", {"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5"),
        ("llama", {"llama.embedding_length": 24}, "has shape .*, the config says"),
        ("qwen3", {"qwen3.attention.sliding_window": 5}, "qwen3.attention.sliding_window is 5"),
        ("gemma3", {"gemma3.attention.sliding_window": None}, "sliding_window is missing"),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": [True]}, "layer_types is"),
    ],
    ids=str,
)
def test_refusals(name, extra, pattern, tmp_path):
    """In one line, with the file and the key, and nothing is left behind."""
    write(tmp_path / "m.gguf", name, extra=extra)
    with pytest.raises(CalmError, match=pattern) as error:
        calm_jax.convert(tmp_path / "m.gguf", tmp_path / "converted")
    assert str(tmp_path / "m.gguf") in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_factors_that_are_no_scaling_of_llama_3(tmp_path, monkeypatch):
    factors = np.array([1, 3, 1.5, 4], np.float32)
    monkeypatch.setattr(gguf_files, "llama3_factors", lambda config: factors)
    write(tmp_path / "m.gguf", "llama")
    with pytest.raises(CalmError, match=r"rope_freqs\.weight is not a scaling of Llama 3"):
        opened(tmp_path / "m.gguf")


def golden_tokenizer(family):
    return json.loads((GOLDEN / "gguf" / f"{family}.json").read_text())


def metadata_of(golden, **own):
    found = {f"tokenizer.{key}": value for key, value in golden["metadata"].items()}
    found["general.architecture"] = golden["family"]
    return found | {f"tokenizer.ggml.{key}": value for key, value in own.items()}


@pytest.mark.parametrize("family", TOKENIZERS)
def test_tokenizers_of_transformers(family, tmp_path):
    """Its ids are by tests/parity/make_gguf_golden.py, with the tokens that it puts around."""
    import tokenizers

    golden = golden_tokenizer(family)
    for name, data in tokenizer_files(metadata_of(golden), "m.gguf").items():
        (tmp_path / name).write_bytes(data)
    whole = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [encoding.ids for encoding in whole.encode_batch(golden["texts"])] == golden["ids"]
    vocabulary = vocabulary_of_folder(tmp_path)
    assert vocabulary.bos_id == golden["bos_token_id"]
    assert vocabulary.eos_ids == (golden["eos_token_id"],)
    assert vocabulary.chat(golden["chat"], add_generation_prompt=False) == golden["chat_text"]
    assert vocabulary.size == len(golden["metadata"]["ggml.tokens"])


def test_ends_and_spaces_that_a_file_names(tmp_path):
    """An end of a turn ends answers too; a file may say that no space stands before a text."""
    metadata = metadata_of(golden_tokenizer("mistral"), eot_token_id=7, add_space_prefix=False)
    for name, data in tokenizer_files(metadata, "m.gguf").items():
        (tmp_path / name).write_bytes(data)
    vocabulary = vocabulary_of_folder(tmp_path)
    assert vocabulary.eos_ids == (2, 7)
    ids = vocabulary.encode("the fox")
    assert vocabulary.tokens()[ids[0]].startswith("t") and vocabulary.decode(ids) == "the fox"


@pytest.mark.parametrize(
    ("own", "pattern"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"pre": "deepseek-coder"}, "tokenizer.ggml.pre is 'deepseek-coder'; supported are"),
        ({"pre": None}, "tokenizer.ggml.pre is missing"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": 5}, "tokenizer.ggml.tokens is not a list of str"),
        ({"token_type": [1, 2]}, "token_type has 2 entries for"),
        ({"merges": ["a b c"]}, "merges has 'a b c', not a pair"),
        ({"merges": ["§ §"]}, "m.gguf: tokenizer.ggml"),
        ({"eos_token_id": 2**32 - 1}, "eos_token_id is 4294967295, not the id of one of"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'; it must be true or false"),
    ],
    ids=str,
)
def test_refused_tokenizers(own, pattern):
    with pytest.raises(CalmError, match=pattern) as error:
        tokenizer_files(metadata_of(golden_tokenizer("llama3"), **own), "m.gguf")
    assert str(error.value).startswith("m.gguf: ") and "\n" not in str(error.value)


def test_a_whole_conversion(tmp_path, caplog):
    """A quantised model is stored as float32, with its own vocabulary, not the one beside it."""
    golden = golden_tokenizer("mistral")
    rows = len(golden["metadata"]["ggml.tokens"])
    config = json.loads((GOLDEN / "qwen3" / "config.json").read_text()) | {"vocab_size": rows}
    tensors = load_file(GOLDEN / "qwen3" / "model.safetensors")
    tensors["model.embed_tokens.weight"] = np.zeros((rows, config["hidden_size"]))
    (tmp_path / "tokenizer.json").write_text("of another model")
    path = tmp_path / "m.gguf"
    gguf_files.write(path, config, tensors, tokenizer=golden["metadata"], stored_as=Kind.F16)
    calm_jax.convert(path, tmp_path / "converted")
    calm_jax.convert(path, tmp_path / "halved", dtype="bfloat16")
    decoder = calm_jax.load(tmp_path / "converted")
    assert decoder.config.dtype == "float32" and decoder.vocabulary.size == rows
    assert calm_jax.load(tmp_path / "halved").config.dtype == "bfloat16"
    assert "--dtype=bfloat16 halves it" in caplog.text and "in its folder" not in caplog.text


def test_q4_0_loaded_as_int4_keeps_every_value(tmp_path):
    """Heads of 32 features: a block of weights lies in one head, as a group does."""
    golden = golden_tokenizer("mistral")
    own = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    own |= {"vocab_size": len(golden["metadata"]["ggml.tokens"]), "num_hidden_layers": 1}
    config = json.loads((GOLDEN / "llama" / "config.json").read_text()) | own
    config |= {"intermediate_size": 96}
    family = find_family(open_source(GOLDEN / "llama"))
    decoder, random = family.decoder_config(config, "m"), np.random.default_rng(0)
    tensors = {
        name: (0.1 * random.normal(size=rule.source_shape(sizes(decoder)))).astype(np.float32)
        for rule in family.rules(decoder)
        for name in rule.names(decoder.num_layers)
    }
    path = tmp_path / "m.gguf"
    gguf_files.write(path, config, tensors, tokenizer=golden["metadata"], stored_as=Kind.Q4_0)
    calm_jax.convert(path, tmp_path / "model")
    stored = flat(module_tree(calm_jax.load(tmp_path / "model")))
    found = flat(stood_for(module_tree(calm_jax.load(tmp_path / "model", dtype="int4"))))
    assert stored.keys() == found.keys()
    for key, weight in stored.items():
        np.testing.assert_array_equal(found[key], weight, key)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file with everything in it, and a place for damaged copies."""
    folder = tmp_path_factory.mktemp("damaged")
    golden = golden_tokenizer("llama3")
    short = {**golden["metadata"], "ggml.merges": golden["metadata"]["ggml.merges"][:10]}
    write(folder / "whole.gguf", "llama", tokenizer=short)
    return (folder / "whole.gguf").read_bytes(), folder / "damaged.gguf"


@hypothesis.given(
    start=st.integers(0, 12_000),
    damage=st.binary(min_size=1, max_size=8),
    cut=st.none() | st.integers(0, 60_000),
)
@hypothesis.settings(max_examples=60)
def test_damaged_files(whole, start, damage, cut):
    """One line that names the file, or a model that its config describes."""
    data, path = whole
    path.write_bytes((data[:start] + damage + data[start + len(damage) :])[:cut])
    try:
        family, source = opened(path)
        reading = family.read(source)
        check_names(
            reading.rules, reading.unused, reading.config.num_layers, source.tensors, str(path)
        )
        check_shapes(reading.rules, reading.config, source.tensors, str(path))
    except CalmError as error:
        assert str(path) in str(error) and "\n" not in str(error)
