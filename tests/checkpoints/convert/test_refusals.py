"""What no family of transformers may convert: each is refused in a line that names it.

Every case is the config.json of a committed model with something in it changed, and goes the whole
road of `calm_jax.convert`. What it should say follows from the format, not from the families' code.
"""

import dataclasses
import json
import pathlib
import time

import hypothesis
import pytest
from hypothesis import strategies as st

import calm_jax
from calm_jax.checkpoints.convert.family import HuggingFaceFamily
from calm_jax.checkpoints.convert.registry import FAMILIES, find_family
from calm_jax.checkpoints.convert.table import check_names, check_shapes
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.errors import CalmError
from calm_jax.models import DecoderConfig

GOLDEN = pathlib.Path(__file__).parent / "golden"
PUBLISHED = [name for name, one in FAMILIES.items() if isinstance(one, HuggingFaceFamily)]
GONE = object()

GPT_J = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "eps": "layer_norm_epsilon",
    "activation": "activation_function",
}
FALCON = {
    "intermediate_size": "ffn_hidden_size",
    "eps": "layer_norm_epsilon",
    "activation": "activation",
}
OWN_KEYS = {
    "gptj": GPT_J,
    "falcon": FALCON,
    "cohere": {"eps": "layer_norm_eps"},
    "gemma2": {"activation": "hidden_activation"},
    "gemma3": {"activation": "hidden_activation"},
}


def key_of(family, meaning):
    """How a family's config.json calls something."""
    usual = {"eps": "rms_norm_eps", "activation": "hidden_act"}
    return OWN_KEYS.get(family, {}).get(meaning, usual.get(meaning, meaning))


def config_of(family):
    return json.loads((GOLDEN / family / "config.json").read_text())


@pytest.fixture
def refused(tmp_path):
    """What a family's model says to a change of its config.json; the change must be refused."""

    def refuse(family, change):
        source, values = tmp_path / "source", config_of(family) | change
        source.mkdir(exist_ok=True)
        if not (source / "model.safetensors").exists():
            (source / "model.safetensors").symlink_to(GOLDEN / family / "model.safetensors")
        values = {key: value for key, value in values.items() if value is not GONE}
        (source / "config.json").write_text(json.dumps(values))
        with pytest.raises(CalmError) as error:
            calm_jax.convert(source, tmp_path / "target")
            pytest.fail(f"{family} is converted with {change}")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        assert "\n" not in str(error.value)
        return str(error.value)

    return refuse


def test_every_family_has_a_model_here():
    assert [name for name in PUBLISHED if not (GOLDEN / name / "config.json").exists()] == []
    assert len(PUBLISHED) >= 10


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def sizes_of(family):
    return [key for key in (key_of(family, size) for size in SIZES) if key in config_of(family)]


@pytest.mark.parametrize("family", PUBLISHED)
def test_sizes_that_are_no_whole_numbers(family, refused):
    for key in sizes_of(family):
        for value in ("32", "", 32.5, 32.0, -1, 0, 2**40, 10**400, True, False, [32], {"a": 1}):
            message = refused(family, {key: value})
            assert f"config.json: {key} is " in message, (key, value)
            assert repr(value)[:10] in message, (key, value)


@pytest.mark.parametrize("family", PUBLISHED)
def test_sizes_that_the_tensors_contradict(family, refused):
    """One number more or less, twice as many, or none, for which the family has a default."""
    values = config_of(family)
    for key in sizes_of(family):
        for value in (values[key] + 1, values[key] - 1, 2 * values[key], GONE):
            # The shapes of GPT-J say nothing of the number of heads.
            if (family, key) == ("gptj", "n_head") and value == 8:
                continue
            message = refused(family, {key: value})
            assert "tensor" in message or "multiple" in message or "rotated" in message, message


@pytest.mark.parametrize("family", PUBLISHED)
def test_null_sizes(family, refused):
    for meaning in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        key = key_of(family, meaning)
        assert f"config.json: {key} is None" in refused(family, {key: None})


@pytest.mark.parametrize("family", PUBLISHED)
def test_epsilons(family, refused):
    key = key_of(family, "eps")
    for value in ("1e-6", 0, -1e-6, float("nan"), float("inf"), True, None, [1e-6], 10**400):
        message = refused(family, {key: value})
        assert f"config.json: {key} is " in message
        assert repr(value)[:10] in message


@pytest.mark.parametrize("family", PUBLISHED)
def test_activations(family, refused):
    key = key_of(family, "activation")
    for value in ("relu", "relu2", "quick_gelu", "swiglu", "SiLU", "", 3, True, ["silu"], {}):
        assert f"config.json: {key} is {value!r}" in refused(family, {key: value})


def rope_changes(family, scaling):
    """The spellings of rotary scaling in config.json."""
    base = {"rope_theta": 1e4}
    yield "rope_scaling", {"rope_scaling": {"rope_type": scaling, "factor": 4.0}}
    yield "type", {"rope_scaling": {"type": scaling, "factor": 4.0}, "rope_parameters": base}
    parameters = {"rope_type": scaling, "factor": 4.0, **base}
    if family == "gemma3":
        for kind in ("full_attention", "sliding_attention"):
            both = {"full_attention": base, "sliding_attention": base}
            yield kind, {"rope_parameters": {**both, kind: parameters}}
    else:
        yield "rope_parameters", {"rope_parameters": parameters}


@pytest.mark.parametrize("family", PUBLISHED)
def test_rotary_positions(family, refused):
    for scaling in ("yarn", "dynamic", "longrope", "su", "mrope", "ntk", "", 4):
        for spelling, change in rope_changes(family, scaling):
            if family == "gemma3" and spelling == "type":
                change["rope_parameters"] = {}
            message = refused(family, change)
            assert "config.json: rope" in message or "config.json: type is" in message, message
            assert repr(scaling) in message
    message = refused(family, {"rope_scaling": "yarn"})
    assert "rope_scaling is 'yarn'" in message


@pytest.mark.parametrize("family", PUBLISHED)
def test_mixtures_of_experts(family, refused):
    keys = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")
    for key in (*keys, "moe_intermediate_size", "moe_layer_freq"):
        assert f"{key} is 8, which is not supported" in refused(family, {key: 8})
    inside = refused(family, {"text_config": {"num_experts": 8}})
    assert "text_config: num_experts is 8, which is not supported" in inside


def test_no_experts_at_all_are_no_mixture(tmp_path):
    change = {"num_experts": 0, "num_local_experts": None, "moe_layers": []}
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama") | change))
    (tmp_path / "model.safetensors").symlink_to(GOLDEN / "llama" / "model.safetensors")
    source = open_source(tmp_path)
    assert find_family(source).read(source).config.num_layers


@pytest.mark.parametrize("family", PUBLISHED)
def test_quantised_weights(family, refused):
    for method in ("gptq", "awq", "fp8", "bitsandbytes"):
        message = refused(family, {"quantization_config": {"quant_method": method}})
        assert "config.json: quantization_config is" in message and method in message


@pytest.mark.parametrize("family", PUBLISHED)
def test_heads_that_are_tied_or_not(family, refused):
    tied = config_of(family)["tie_word_embeddings"]
    for value in ("true", 2, "", [True]):
        assert f"config.json: tie_word_embeddings is {value!r}" in refused(
            family, {"tie_word_embeddings": value}
        )
    message = refused(family, {"tie_word_embeddings": not tied})
    assert "lm_head.weight" in message or "tie_word_embeddings is True" in message


YES = (1, "yes", None)
SWITCHES = {
    "llama": [("attention_bias", (False, *YES)), ("mlp_bias", (False, *YES))],
    "mistral": [
        ("sliding_window", (0, -1, "4", 4.5, True)),
        ("layer_types", (["full_attention"] * 3, "full_attention", [])),
        ("head_dim", (7,)),
        ("num_key_value_heads", (3, 8)),
    ],
    "qwen2": [
        ("use_sliding_window", YES),
        ("sliding_window", (0, "4", 4.5)),
        ("layer_types", (["full_attention"] * 2, ["chunked_attention"] * 3, [None] * 3, {})),
        ("num_key_value_heads", (3, 8)),
    ],
    "qwen3": [
        ("attention_bias", (True, *YES)),
        ("use_sliding_window", YES),
        ("layer_types", (["sliding_attention"] * 3,)),
        ("head_dim", (7, 128)),
    ],
    "gemma": [
        ("attention_bias", (True, *YES[1:])),
        ("use_bidirectional_attention", (True, "all")),
        ("num_key_value_heads", (3, 8)),
    ],
    "gemma2": [
        ("attention_bias", (True,)),
        ("query_pre_attn_scalar", (0, -8, "8", None, True)),
        ("attn_logit_softcapping", (0, -50.0, "50", True)),
        ("final_logit_softcapping", (0, float("nan"), [30.0])),
        ("sliding_window", (0, None, "4")),
        ("layer_types", (["linear_attention"] * 3,)),
    ],
    "gemma3": [
        ("attn_logit_softcapping", (50.0,)),
        ("use_bidirectional_attention", (True,)),
        ("text_config", ("gemma", [], 3)),
        ("sliding_window", (0, None)),
    ],
    "gptj": [
        ("rotary_dim", (None, "4", 0, 3, 10, 4.0, True)),
        ("rope_theta", (5e5, "1e4")),
        ("tie_word_embeddings", (True,)),
    ],
    "falcon": [
        ("multi_query", (False, None)),
        ("parallel_attn", (False, None)),
        ("new_decoder_architecture", (True, "yes")),
        ("alibi", (True,)),
        ("bias", (True,)),
    ],
    "cohere": [
        ("use_qk_norm", (True, "yes")),
        ("attention_bias", (True, *YES)),
        ("logit_scale", (0, None, "1", -1.0, float("inf"))),
        ("num_key_value_heads", (3, 8)),
    ],
}


CONTRADICTIONS = {
    "llama": [("attention_bias", False), ("mlp_bias", False)],
    "mistral": [
        ("layer_types", ["full_attention"] * 3),
        ("head_dim", 7),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
    ],
    "qwen2": [("num_key_value_heads", 3), ("num_key_value_heads", 8)],
    "qwen3": [
        ("attention_bias", True),
        ("layer_types", ["sliding_attention"] * 3),
        ("head_dim", 7),
        ("head_dim", 128),
    ],
    "gemma": [("num_key_value_heads", 3), ("num_key_value_heads", 8)],
    "gptj": [("rotary_dim", 3), ("rotary_dim", 10)],
    "cohere": [
        ("attention_bias", True),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
    ],
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_only_this_family_has(family, refused):
    for key, values in SWITCHES[family]:
        for value in values:
            message = refused(family, {key: value})
            # A value that could be true contradicts the tensors or another value, which tell.
            if f"{key} is {value!r}"[:40] not in message:
                assert (key, value) in CONTRADICTIONS[family]
                assert "tensor " in message or "decoder" in message or key in message, message


# Mixtures of experts, encoders, learned positions, other blocks, other heads, parts of models.
OTHERS = (
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "Llama4ForConditionalGeneration",
    "GptOssForCausalLM",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "BertForMaskedLM",
    "GPT2LMHeadModel",
    "OPTForCausalLM",
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "GPTNeoXForCausalLM",
    "CodeGenForCausalLM",
    "BloomForCausalLM",
    "Olmo2ForCausalLM",
    "Cohere2ForCausalLM",
    "Gemma3nForConditionalGeneration",
    "MambaForCausalLM",
    "RWForCausalLM",
    "LlamaForSequenceClassification",
    "LlamaModel",
    "llamaforcausallm",
    "",
)


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures(architecture, refused):
    message = refused("llama", {"architectures": [architecture]})
    assert f"config.json says {architecture}, a family that is not supported" in message
    assert f"supported are {', '.join(FAMILIES)}" in message


def test_what_others_have_that_is_not_supported(refused):
    mixture = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}
    message = refused("llama", mixture)
    assert "config.json of MixtralForCausalLM: num_local_experts is 8, which is not" in message
    encoder = {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    message = refused("llama", encoder)
    assert "of T5ForConditionalGeneration: is_encoder_decoder is True, which is not" in message


def test_the_family_is_named(refused):
    message = refused("qwen2", {"rope_scaling": {"type": "yarn", "factor": 2.0}})
    assert "config.json: rope_scaling: type is 'yarn'" in message
    assert message.endswith("(family qwen2)")


@pytest.mark.parametrize("family", PUBLISHED)
def test_without_architectures_model_type_decides(family):
    """A config's own `save_pretrained` writes none, and transformers does not ask for them."""
    source = open_source(GOLDEN / family)
    config = {key: value for key, value in source.config.items() if key != "architectures"}
    for change in ({}, {"architectures": None}, {"architectures": []}):
        assert find_family(dataclasses.replace(source, config=config | change)).name == family


def test_no_architecture(refused):
    for value in (GONE, None, []):
        message = refused("llama", {"architectures": value, "model_type": GONE})
        assert "config.json says no architecture, a family that is not supported" in message
        message = refused("llama", {"architectures": value, "model_type": "mixtral"})
        assert "config.json says model_type 'mixtral', a family that is not supported" in message
    for value in ("LlamaForCausalLM", [3], {"LlamaForCausalLM": 1}, 3):
        assert f"config.json: architectures is {value!r}" in refused(
            "llama", {"architectures": value}
        )


@pytest.mark.parametrize("family", PUBLISHED)
def test_tensors_of_other_families(family, refused):
    """A config.json that says another family than the tensors are of."""
    for other in PUBLISHED:
        mine, theirs = (config_of(name) for name in (family, other))
        if other != family:
            assert "tensor" in refused(family, dict.fromkeys(mine, GONE) | theirs)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 70)
    | st.sampled_from([2**24, 10**400, "default", "linear", "llama3", "silu", "gelu"])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=4,
)
ROPE_KEYS = ("rope_theta", "rope_type", "type", "factor", "full_attention", "sliding_attention")
OTHER_KEYS = (
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "sliding_window",
    "sliding_window_pattern",
    "text_config",
)


@pytest.mark.parametrize("family", PUBLISHED)
def test_any_config_is_read_or_refused(family):
    """Whatever config.json holds: one line, or a model that the tensors fit, and soon."""
    values, source = config_of(family), open_source(GOLDEN / family)
    changes = st.dictionaries(
        st.sampled_from(sorted({*values, *OTHER_KEYS})),
        JSON | st.dictionaries(st.sampled_from(ROPE_KEYS), JSON, max_size=3),
        min_size=1,
        max_size=3,
    )

    @hypothesis.given(changes)
    @hypothesis.settings(max_examples=80)
    def check(change):
        started = time.monotonic()
        changed = type(source)(source.path, source.kind, source.tensors, values | change)
        try:
            reading = FAMILIES[family].read(changed)
            layers = reading.config.num_layers
            check_names(reading.rules, reading.unused, layers, reading.tensors, "model")
            check_shapes(reading.rules, reading.config, reading.tensors, "model")
        except CalmError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 1000
        else:
            assert DecoderConfig.from_dict(reading.config.to_dict()) == reading.config
        assert time.monotonic() - started < 20

    check()


def test_the_families_that_are_known_are_listed():
    source = open_source(GOLDEN / "llama")
    with pytest.raises(CalmError, match=r"--format=lama is unknown; known are auto, llama, ") as e:
        find_family(source, "lama")
    assert all(name in str(e.value) for name in FAMILIES)
