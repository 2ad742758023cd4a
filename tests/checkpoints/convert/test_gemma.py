"""Gemma 1, 2 and 3 of transformers: config.json in all spellings, names, and committed outputs."""

import json
import pathlib

import hypothesis
import numpy as np
import pytest
import safetensors.numpy
from converting import decoder_in_memory
from etils import epath
from hypothesis import strategies as st

import calm_jax
from calm_jax import DecoderConfig
from calm_jax.checkpoints.convert.gemma import Gemma, Gemma2, Gemma3
from calm_jax.checkpoints.convert.huggingface_config import GLOBAL, LOCAL, local_layer_fields
from calm_jax.checkpoints.convert.table import check_names, check_shapes
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.checkpoints.sources.source import Source
from calm_jax.errors import CalmError
from calm_jax.models.config import RopeScaling

WHERE = "model/config.json"
SIZES = {
    "vocab_size": 32,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
TENTHS = st.integers(1, 10**6).map(lambda tenth: tenth / 10)


@st.composite
def configs(draw, family):
    """Forms that `family` can express."""
    num_kv_heads = draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 4))
    num_layers = draw(st.integers(1, 9))
    fields = {
        "vocab_size": draw(st.integers(1, 40)),
        "embed_dim": draw(st.integers(1, 40)),
        "num_layers": num_layers,
        "num_heads": num_kv_heads * draw(st.integers(1, 3)),
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "mlp_dim": draw(st.integers(1, 40)),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tied_head": draw(st.booleans()),
        "rope_base": draw(TENTHS),
        "rope_scaling": draw(
            st.none()
            | TENTHS.map(lambda factor: RopeScaling("linear", factor))
            | st.builds(
                RopeScaling,
                st.just("llama3"),
                TENTHS,
                st.floats(0.5, 1.0),
                st.floats(1.5, 4.0),
                st.integers(1, 8192),
            )
        ),
    }
    if family is not Gemma:
        local = draw(st.lists(st.booleans(), min_size=num_layers, max_size=num_layers))
        query_width = draw(st.integers(1, 300))
        fields |= {
            "post_norms": True,
            "query_scale": query_width**-0.5,
            "final_logit_cap": draw(st.none() | TENTHS),
            **local_layer_fields(local, draw(st.integers(1, 50))),
        }
        if family is Gemma2:
            fields["attention_logit_cap"] = draw(st.none() | TENTHS)
        else:
            fields["qk_norm"] = "rms"
            local_base = draw(TENTHS)
            if any(local) and draw(st.booleans()):
                hypothesis.assume((local_base, None) != (fields["rope_base"], None))
                fields["local_rope_base"] = local_base
    return DecoderConfig.gemma(**fields)


@pytest.mark.parametrize("family", [Gemma, Gemma2, Gemma3])
def test_config_json_is_read_back_as_it_was(family):
    @hypothesis.given(configs(family))
    @hypothesis.settings(max_examples=150)
    def check(config):
        values = json.loads(json.dumps(family().huggingface_config(config)))
        assert family().decoder_config(values, WHERE) == config

    check()


GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("name", "family"),
    [("gemma", Gemma()), ("gemma2", Gemma2()), ("gemma3", Gemma3()), ("gemma3_seeing", Gemma3())],
)
def test_logits_are_those_of_transformers(name, family):
    """The outputs are by tests/parity/make_golden.py."""
    source = open_source(GOLDEN / name)
    assert family.recognises(source)
    with np.load(GOLDEN / name / "logits.npz") as golden:
        logits = np.asarray(decoder_in_memory(family, source)(golden["tokens"]))
        difference = np.max(np.abs(logits - golden["logits"]))
        # The exact gelu in place of the tanh form changes less than 1e-4 of the largest logit.
        assert difference <= 4e-6 * np.max(np.abs(golden["logits"]))


def test_absent_keys_mean_what_they_mean_to_transformers():
    sizes = ("vocab_size", "embed_dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads")
    first, second, third = (
        family().decoder_config({}, WHERE) for family in (Gemma, Gemma2, Gemma3)
    )
    assert [getattr(first, size) for size in sizes] == [256_000, 3072, 24_576, 28, 16, 16]
    assert [getattr(second, size) for size in sizes] == [256_000, 2304, 9216, 26, 8, 4]
    assert [getattr(third, size) for size in sizes] == [262_208, 2304, 9216, 26, 8, 4]
    for config in (first, second, third):
        assert (config.head_dim, config.norm_eps, config.tied_head) == (256, 1e-6, True)
        assert (config.norm_offset, config.activation) == (1.0, "gelu_tanh")
        assert config.embed_scale == config.embed_dim**0.5
        assert config.scale == 256**-0.5
    assert (first.rope_base, first.window, first.final_logit_cap) == (1e4, None, None)
    assert (second.attention_logit_cap, second.final_logit_cap) == (50.0, 30.0)
    assert (second.window, second.window_pattern, second.rope_base) == (4096, (True, False), 1e4)
    assert (third.attention_logit_cap, third.final_logit_cap) == (None, None)
    assert (third.window, third.window_pattern) == (4096, (True,) * 5 + (False,))
    assert (third.rope_base, third.local_rope_base, third.qk_norm) == (1e6, 1e4, "rms")


def test_the_published_config_of_4b_leaves_most_of_it_to_defaults():
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    values = {"text_config": text, "torch_dtype": "bfloat16", "vision_config": {}}
    assert Gemma3().decoder_config(values, WHERE) == DecoderConfig.gemma(
        vocab_size=262_208,
        embed_dim=2560,
        num_layers=34,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        mlp_dim=10_240,
        post_norms=True,
        qk_norm="rms",
        query_scale=256**-0.5,
        window=1024,
        window_pattern=(True,) * 5 + (False,),
        rope_base=1e6,
        rope_scaling=RopeScaling("linear", 8.0),
        local_rope_base=1e4,
    )


NEW_3 = SIZES | {
    "rope_parameters": {
        GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        LOCAL: {"rope_type": "default", "rope_theta": 2e4},
    },
    "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL],
    "sliding_window": 4,
    "dtype": "bfloat16",
}
OLD_3 = SIZES | {
    "rope_theta": 5e5,
    "rope_local_base_freq": 2e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window_pattern": 3,
    "sliding_window": 4,
    "torch_dtype": "bfloat16",
    "cache_implementation": "hybrid",
}


def test_old_and_new_spellings_are_one():
    new = Gemma3().decoder_config(NEW_3, WHERE)
    assert new == Gemma3().decoder_config(OLD_3, WHERE)
    older = OLD_3 | {"rope_scaling": {"type": "linear", "factor": 8.0}}
    assert new == Gemma3().decoder_config(older, WHERE)
    assert new.rope_scaling == RopeScaling("linear", 8.0)
    assert (new.rope_base, new.local_rope_base) == (5e5, 2e4)
    assert new.window_pattern == (True, True, False)
    for family in (Gemma(), Gemma2()):
        old = family.decoder_config(SIZES | {"rope_theta": 5e5, "rope_scaling": None}, WHERE)
        values = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
        assert old == family.decoder_config(values, WHERE)
        assert old.rope_base == 5e5


def test_null_caps_are_no_caps():
    values = SIZES | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = Gemma2().decoder_config(values, WHERE)
    assert (config.attention_logit_cap, config.final_logit_cap) == (None, None)


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh"])
def test_the_first_gelu_means_tanh(name):
    config = Gemma().decoder_config(SIZES | {"hidden_act": name, "hidden_activation": None}, WHERE)
    assert config.activation == "gelu_tanh"
    assert (
        Gemma2().decoder_config(SIZES | {"hidden_activation": "gelu"}, WHERE).activation == "gelu"
    )


def test_patterns_are_cut_off_at_the_end_and_shortest():
    layers = [(layer + 1) % 6 != 0 for layer in range(26)]
    assert local_layer_fields(layers, 8)["window_pattern"] == (True,) * 5 + (False,)
    assert local_layer_fields(layers[:4], 8)["window_pattern"] == (True,)
    assert local_layer_fields([False] * 4, 8) == {}
    config = Gemma3().decoder_config(SIZES | {"num_hidden_layers": 8}, WHERE)
    assert config.local_layers == (True,) * 5 + (False,) + (True,) * 2


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        (Gemma, {"attention_bias": True}, "attention_bias"),
        (Gemma, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (Gemma3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (Gemma3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (Gemma2, {"hidden_activation": "relu"}, "hidden_activation.*relu"),
        (Gemma2, {"sliding_window": None}, "sliding_window"),
        (Gemma2, {"sliding_window": "4"}, "sliding_window"),
        (Gemma2, {"layer_types": [LOCAL]}, "layer_types.*8 layers"),
        (Gemma2, {"layer_types": ["chunked_attention"] * 8}, "layer_types.*chunked"),
        (Gemma2, {"layer_types": [[]] * 8}, "layer_types"),
        (Gemma3, {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        (Gemma3, {"hidden_size": "12"}, "hidden_size"),
        (Gemma3, {"text_config": 3}, "text_config is 3"),
        (Gemma3, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        (
            Gemma3,
            {"rope_parameters": {LOCAL: {"rope_type": "linear", "factor": 2.0}}},
            "rope scaling of sliding_attention",
        ),
    ],
)
def test_what_changes_the_computation_and_is_not_supported_is_named(family, values, message):
    with pytest.raises(CalmError, match=f"(?s)model/config.json.*{message}"):
        family().decoder_config(SIZES | values, WHERE)


SEEING = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {k: v for k, v in OLD_3.items() if k != "vocab_size"} | {"vocab_size": 32},
    "vision_config": {"hidden_size": 5, "num_hidden_layers": 1},
}


def random_tensors(family, config, seed=0):
    rng = np.random.default_rng(seed)
    tensors = {}
    axes = {
        "V": config.vocab_size, "D": config.embed_dim, "N": config.num_heads,
        "K": config.num_kv_heads, "H": config.head_dim, "F": config.mlp_dim,
    }  # fmt: skip
    for line in family.rules(config):
        for name in line.names(config.num_layers):
            tensors[name] = rng.normal(size=line.source_shape(axes)).astype(np.float32)
    return tensors


def in_memory(tensors, config=None):
    return Source(epath.Path("model"), "huggingface", tensors, config)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_one_that_sees(prefix):
    """The text part has the parameters of the text model, whatever its names begin with."""
    family = Gemma3()
    alone = in_memory(random_tensors(family, family.decoder_config(OLD_3, WHERE)), OLD_3)
    tensors = {name.replace("model.", prefix, 1): x for name, x in alone.tensors.items()}
    eyes = {"language_model.model.": "", "model.language_model.": "model."}[prefix]
    tensors |= {
        f"{eyes}vision_tower.vision_model.embeddings.patch_embedding.bias": np.ones(3, np.float32),
        f"{eyes}multi_modal_projector.mm_input_projection_weight": np.ones((3, 4), np.float32),
    }
    source = in_memory(tensors, SEEING)
    assert family.recognises(source)
    whole = decoder_in_memory(family, alone)
    part = decoder_in_memory(family, source)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    assert np.array_equal(whole(tokens), part(tokens))


def test_a_head_beside_a_tied_embedding_must_equal_it(tmp_path):
    arrays = safetensors.numpy.load_file(GOLDEN / "gemma" / "model.safetensors")
    head = arrays["model.embed_tokens.weight"]
    for name, changed in (("same", head), ("other", head + 1)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes((GOLDEN / "gemma" / "config.json").read_bytes())
        safetensors.numpy.save_file(
            arrays | {"lm_head.weight": changed}, folder / "model.safetensors"
        )
    calm_jax.convert(tmp_path / "same", tmp_path / "frozen")
    assert calm_jax.load(tmp_path / "frozen").config.tied_head
    with pytest.raises(CalmError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        calm_jax.convert(tmp_path / "other", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_tensor_in_two_forms_is_refused():
    family = Gemma3()
    tensors = random_tensors(family, family.decoder_config(OLD_3, WHERE))
    tensors["language_model.model.norm.weight"] = tensors["model.norm.weight"]
    with pytest.raises(CalmError, match="twice"):
        family.read(in_memory(tensors, OLD_3))


@pytest.mark.parametrize("family", [Gemma(), Gemma2(), Gemma3()])
def test_names_and_shapes_are_checked(family):
    config = family.decoder_config(SIZES, WHERE)
    tensors = random_tensors(family, config)
    check = lambda t: (  # noqa: E731
        check_names(family.rules(config), family.unused(config), 8, t, "model"),
        check_shapes(family.rules(config), config, t, "model"),
    )
    check(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    check(tensors | {"model.layers.3.self_attn.rotary_emb.inv_freq": np.ones(3)})
    for name in list(tensors)[:14]:
        with pytest.raises(CalmError, match=name.replace(".", r"\.")):
            check({key: x for key, x in tensors.items() if key != name})
    with pytest.raises(CalmError, match=r"model\.layers\.8\.mlp"):
        check(tensors | {"model.layers.8.mlp.up_proj.weight": np.ones(3)})


def test_rotary_positions_are_written_in_both_spellings():
    """transformers 4 reads no `rope_parameters`, and took its own defaults without a word."""
    config = Gemma3().decoder_config(OLD_3, WHERE)
    values = Gemma3().huggingface_config(config)
    old = ("rope_theta", "rope_local_base_freq", "rope_scaling")
    assert {key: values[key] for key in old} == {key: OLD_3[key] for key in old}
    assert Gemma3().decoder_config({**values, "rope_parameters": None}, WHERE) == config
    assert Gemma3().decoder_config({**values, **dict.fromkeys(old)}, WHERE) == config
