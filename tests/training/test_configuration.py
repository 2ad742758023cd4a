import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, DecoderConfig, RopeScaling
from calm_jax.training import configuration
from calm_jax.training.config_keys import flatten, to_dict
from calm_jax.training.configuration import composed_run, decoder_run, differences

SIZES = {
    "vocab_size": 32,
    "embed_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "head_dim": 8,
    "mlp_dim": 32,
}
FAMILIES = {
    "palm": DecoderConfig.palm(**SIZES),
    "llama": DecoderConfig.llama(**SIZES, num_kv_heads=1, window=4, window_pattern=(True, False)),
    "gemma": DecoderConfig.gemma(
        **SIZES, num_kv_heads=2, qk_norm="rms", rope_scaling=RopeScaling(factor=8.0)
    ),
}


def decoder_config(family="palm") -> ConfigDict:
    config = decoder_run(FAMILIES[family])
    config.data.train = ({"task": "some/task"},)
    return config


def composed_config(*compositions) -> ConfigDict:
    config = composed_run(*compositions)
    config.anchor = "anchor"
    config.augments = ("one", "two")
    config.data.train = ({"jsonl": "some.jsonl"},)
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoders_config_survives_config_and_json(family):
    config = decoder_config(family)
    configuration.validate(config)
    fields = json.loads(json.dumps(to_dict(config)))["decoder"]
    assert fields.pop("from") == ""
    assert DecoderConfig.from_dict(fields) == FAMILIES[family]


@pytest.mark.parametrize(
    "compositions",
    [
        (),
        (CompositionConfig.paper(connections=((0, 1), (1, 3))),),
        (CompositionConfig(every=2), CompositionConfig(gate=True, num_heads=2)),
    ],
)
def test_compositions_survive_config_and_json(compositions):
    config = composed_config(*compositions)
    configuration.validate(config)
    found = json.loads(json.dumps(to_dict(config)))["composition"]
    found = found if isinstance(found, list) else [found]
    expected = list(compositions) or [CompositionConfig()]
    assert [CompositionConfig.from_dict(fields) for fields in found] == expected


def changed(config: ConfigDict, key: str, value) -> ConfigDict:
    *sections, last = key.split(".")
    holder = config
    for section in sections:
        holder = holder[section]
    with holder.ignore_type():
        holder[last] = value
    return config


@pytest.mark.parametrize(
    ("rank", "trainable", "refused"),
    [
        (0, (), False),
        (0, ("bridge",), False),
        (2, (), False),
        (2, ("lora", "bridge"), False),
        (2, ("lora",), True),
        (2, ("bridge",), True),
        (0, ("lora",), True),
        (0, ("all",), True),
    ],
)
def test_a_composed_run_trains_all_that_it_saves(rank, trainable, refused):
    """What is new and not trained would be in no checkpoint."""
    config = changed(composed_config(), "lora.rank", rank)
    config = changed(config, "train.trainable", trainable)
    if not refused:
        return configuration.validate(config)
    with pytest.raises(CalmError, match=r"train\.trainable (is|has) "):
        configuration.validate(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kind", "model", "kind is 'model'; known are 'decoder' and 'composed'"),
        ("optimiser", 1, "unknown config key 'optimiser'; did you mean 'optimizer'?"),
        ("train.num_step", 1, "'train.num_step'; did you mean 'train.num_steps'?"),
        ("train.num_steps", 0, "train.num_steps is 0; it must be at least 1"),
        ("train.num_steps", 10.5, "train.num_steps is 10.5; it must be of type int"),
        ("train.num_steps", True, "train.num_steps is True; it must be of type int"),
        ("train.num_steps", None, "train.num_steps is None; it must be of type int"),
        ("train.seed", -1, "train.seed is -1; it must be at least 0"),
        ("train.accumulate", 3, "train.batch_size 64 is not divisible by train.accumulate 3"),
        ("train", 7, "train is 7; it must be a section of keys"),
        ("optimizer.name", "sgd", "is 'sgd'; known are 'adamw', 'adafactor', 'muon'"),
        ("optimizer.schedule", "step", "known are 'cosine', 'linear', 'constant'"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate is nan"),
        ("optimizer.learning_rate", -0.1, "optimizer.learning_rate is -0.1"),
        ("optimizer.final_fraction", 1.5, "optimizer.final_fraction is 1.5; it must be at most 1"),
        ("lora.alpha", 32.0, "lora.alpha is set, but lora.rank is 0"),
        ("lora.targets", ("query",), "lora.targets is set, but lora.rank is 0"),
        ("train.validate_every", 5, "validate_every is 5, but data.validation is empty"),
        ("optimizer.warmup_steps", 1000, "warmup_steps 1000 is not less than train.num_steps 1000"),
        ("data.train", (), "data.train is empty"),
        ("data.length", 0, "data.length is 0"),
        ("decoder.embed_dim", None, "decoder.embed_dim is not set"),
        ("decoder.num_kv_heads", 3, "num_heads 2 is not a multiple of num_kv_heads 3"),
        ("decoder.window_pattern", 3, "decoder.window_pattern is 3; it must be of type tuple"),
        ("decoder.from", "runs/a/frozen", "but decoder.from 'runs/a/frozen' sets it"),
    ],
)  # fmt: skip
def test_a_bad_key_of_a_decoders_run_is_named_with_its_value(key, value, message):
    with pytest.raises(CalmError) as caught:
        configuration.validate(changed(decoder_config(), key, value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("anchor", "", "anchor is empty"),
        ("augments", (), "augments is empty"),
        ("augments", ("one", ""), "augments[1] is ''; it must name a frozen folder"),
        ("augments", (1, 2), "augments[0] is 1; it must name a frozen folder"),
        ("composition.connections", ((0, 0), (0, 0)), "lists (0, 0) twice"),
        ("composition.init", "ones", "composition.init is 'ones'"),
        ("composition.evry", 3, "did you mean 'composition.every'?"),
        ("train.noise", -0.5, "train.noise is -0.5; it must be at least 0"),
        ("decoder", {}, "unknown config key 'decoder'"),
    ],
)
def test_a_bad_key_of_a_composed_run_is_named_with_its_value(key, value, message):
    with pytest.raises(CalmError) as caught:
        configuration.validate(changed(composed_config(), key, value))
    assert message in str(caught.value)


def test_the_number_of_compositions_is_that_of_the_augments():
    config = composed_config(*[CompositionConfig()] * 3)
    with pytest.raises(CalmError, match="composition has 3 configs for 2 augments"):
        configuration.validate(config)


def test_the_augment_of_a_bad_composition_is_named():
    config = composed_config(CompositionConfig(), CompositionConfig())
    config.composition[1].init = "ones"
    with pytest.raises(CalmError, match=r"^augment 1: composition\.init is 'ones'"):
        configuration.validate(config)


def test_a_missing_key_is_named():
    config = decoder_config()
    del config.train.keep
    with pytest.raises(CalmError, match=r"train\.keep is missing"):
        configuration.validate(config)


def test_the_moments_decays_belong_to_adamw():
    config = decoder_config()
    config.optimizer.name = "adafactor"
    configuration.validate(config)
    config.optimizer.b2 = 0.95
    with pytest.raises(CalmError, match=r"optimizer\.b2 is set, but .* 'adafactor'"):
        configuration.validate(config)


def test_a_constant_rate_has_no_final_fraction():
    config = changed(decoder_config(), "optimizer.schedule", "constant")
    configuration.validate(config)
    config.optimizer.final_fraction = 0.1
    with pytest.raises(CalmError, match=r"final_fraction is 0\.1, but optimizer\.schedule is 'con"):
        configuration.validate(config)


def test_a_decoder_from_a_frozen_folder_needs_no_form():
    config = decoder_run()
    config.data.train = ({"task": "some/task"},)
    config.decoder["from"] = "runs/a/frozen"
    configuration.validate(config)


def test_every_table_of_keys_names_keys_that_exist():
    runs = (decoder_config(), configuration.composed_run())
    keys = {key for run in runs for key in flatten(to_dict(run))}
    tables = (configuration._LEAST, configuration._MOST, configuration._CHOICES)
    for key in (key for table in tables for key in table):
        assert key in keys
    for free in configuration.MAY_CHANGE:
        assert any(key == free or key.startswith(f"{free}.") for key in keys)


@pytest.mark.parametrize(
    ("key", "value"),
    [("mesh.fsdp", 2), ("train.num_steps", 5), ("train.save_every", 7), ("evaluate.limit", 3)],
)
def test_a_run_may_be_resumed_with_another(key, value):
    old, new = decoder_config(), changed(decoder_config(), key, value)
    assert to_dict(old) != to_dict(new)
    assert differences(to_dict(old), to_dict(new)) == {}


def test_differences_name_both_values_after_json():
    old, new = decoder_config("llama"), decoder_config("palm")
    new.train.batch_size = 128
    new.mesh.data = 4
    found = differences(json.loads(json.dumps(to_dict(old))), to_dict(new))
    assert found["train.batch_size"] == (64, 128)
    assert found["decoder.window_pattern"] == ([True, False], [True])
    assert "mesh.data" not in found
    assert "data.train" not in found


nested = st.recursive(
    st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["data", "train", "x"]), nested, max_size=3))
def test_a_config_does_not_differ_from_itself_and_flattens_to_its_leaves(values):
    assert differences(values, json.loads(json.dumps(values))) == {}
    for key, leaf in flatten(values).items():
        found = values
        for part in key.split("."):
            found = found[part]
        assert found == leaf


def test_keys_without_an_effect_make_no_other_run():
    """Runs from before `validate` refused them can be continued."""
    old = to_dict(decoder_config())
    old["optimizer"] |= {"schedule": "constant", "final_fraction": 0.1}
    old["lora"] |= {"alpha": 8.0, "targets": ["q"]}
    new = copy.deepcopy(old)
    new["optimizer"]["final_fraction"], new["lora"] = (
        0.0,
        old["lora"] | {"alpha": 0.0, "targets": []},
    )
    assert not differences(old, new)
    for section, key, value in (("optimizer", "schedule", "cosine"), ("lora", "rank", 4)):
        other = copy.deepcopy(new)
        other[section][key] = value
        assert len(differences(old, other)) > 1


def test_a_key_without_a_value_is_as_if_it_were_absent():
    """Runs from before `data.augment_length` existed can be continued."""
    new = to_dict(composed_run())
    old = copy.deepcopy(new)
    del old["data"]["augment_length"]
    assert not differences(old, new)
    config = composed_run()
    config.data.augment_length = 0
    with pytest.raises(CalmError, match=r"data\.augment_length is 0; it must be at least 1"):
        configuration.validate(config)
