"""The config of a run: every key with its default, and its validation.

A config file returns `decoder_run(...)` or `composed_run(...)` with some keys changed.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from calm_jax.checkpoints.frozen import DTYPES
from calm_jax.data.entries import check_entry
from calm_jax.errors import CalmError
from calm_jax.models.attention_choice import BACKENDS
from calm_jax.models.config import CompositionConfig, DecoderConfig
from calm_jax.models.execution import REMAT
from calm_jax.sharding import WEIGHT_RULES
from calm_jax.training.config_keys import flatten, to_dict, unknown_key


def decoder_run(decoder: DecoderConfig | None = None) -> ConfigDict:
    """The config of a run that trains one decoder.

    Args:
        decoder: the decoder's config. If None, set `decoder["from"]` of the result, or all fields
            of its `decoder` that have no default.
    """
    config = _common("decoder")
    config.decoder = _section(DecoderConfig, decoder)
    config.decoder["from"] = ""  # a frozen folder to start from; "": random values
    return config


def composed_run(*compositions: CompositionConfig) -> ConfigDict:
    """The config of a run that trains the bridge of a composed model.

    Args:
        compositions: one for each augment, or one for all; default: `CompositionConfig()`.
    """
    config = _common("composed")
    config.anchor = ""  # frozen folder of the anchor
    config.anchor_dtype = ""  # "float32", "bfloat16", "int8" or "int4"; "": as stored
    config.augments = ()  # frozen folders of the augments
    config.augment_dtype = ""  # the same for every augment
    sections = tuple(_section(CompositionConfig, each) for each in compositions or (None,))
    config.composition = sections if len(sections) > 1 else sections[0]
    return config


def _common(kind: str) -> ConfigDict:
    config = ConfigDict()
    config.name = ""  # the run's name in reports; "": the name of its folder
    config.kind = kind  # "decoder" or "composed"
    # "bytes", "key_value/CONFIG", a SentencePiece .model, a tokenizer.json or a saved folder; "":
    # that of the frozen model.
    config.vocabulary = ""

    config.data = ConfigDict()
    # Entries, mixed by weight. Each is {"task": name}, {"jsonl": path} or {"parquet": path}, with
    # optional "weight" (1.0), "loss_on_inputs" (False: loss on answers only), "import" (module that
    # registers the task) and "columns" (of a file: {"inputs": "question", "targets": "answer"}).
    config.data.train = ()
    config.data.validation = ()  # entries as in `train`; they decide which checkpoint is the best
    config.data.length = 512  # tokens in a row
    # tokens in a row of an augment whose tokenizer is not the anchor's; None: data.length
    config.data.augment_length = placeholder(int)
    config.data.pack = True  # whether to pack several sequences into a row
    # True: a prompt and answer longer than a row are an error; False: they are cut. Plain text
    # continues in further rows.
    config.data.strict = False
    config.data.limit = 0  # most examples of each task; 0: all
    config.data.seed = 0  # seed of the order of training rows
    config.data.cache_dir = ""  # folder of tokenised rows; "": $CALM_CACHE, else ~/.cache/calm_jax

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # "adamw", "adafactor" or "muon"
    config.optimizer.learning_rate = 1e-3  # the peak, reached after the warm-up
    config.optimizer.schedule = "cosine"  # after the warm-up: "cosine", "linear" or "constant"
    config.optimizer.warmup_steps = 0  # steps in which the rate grows linearly
    config.optimizer.final_fraction = 0.0  # rate at the last step, as a fraction of the peak
    config.optimizer.weight_decay = 0.0  # only of matrices; multiplied by the learning rate
    config.optimizer.b1 = 0.9  # decay of the first moment; adamw, and muon's Adam
    config.optimizer.b2 = 0.999  # decay of the second moment; adamw, and muon's Adam
    config.optimizer.clip_norm = 1.0  # largest global norm of the gradient; 0: no clipping

    config.mesh = ConfigDict()
    config.mesh.slices = 0  # slices of a pod, which split only the batch; 0: as the devices form
    config.mesh.data = -1  # devices that split only the batch; -1: all remaining
    config.mesh.fsdp = 1  # devices that split the batch and every weight
    config.mesh.tensor = 1  # devices that split heads, MLP features and vocabulary

    # "xla", "chunked", "splash" (TPU) or "cudnn" (GPU); "auto": the best for the devices.
    config.attention = "auto"
    # "fsdp": weights are split over mesh.fsdp and mesh.tensor; "all": also over mesh.data.
    config.weight_sharding = "fsdp"

    config.train = ConfigDict()
    config.train.num_steps = 1000  # steps of the whole training
    config.train.batch_size = 64  # rows in a step, over all devices
    config.train.accumulate = 1  # micro-batches in a step: less memory, same gradient
    # What the backward pass recomputes to save memory: "none"; "full": all but the input of each
    # layer; "dots": all but products with weights; "offload": as "full", with the inputs in host
    # memory.
    config.train.remat = "none"
    config.train.loss_chunk = 128  # positions of a row whose logits exist at once; 0: all
    config.train.seed = 0  # seed of initial values and noise
    # Noise on a decoder's embeddings or a composed model's taps, relative to their root mean
    # square.
    config.train.noise = 0.0
    config.train.log_every = 10  # steps between lines of metrics.jsonl
    config.train.validate_every = 0  # steps between validations; 0: only at the end
    config.train.save_every = 0  # steps between checkpoints; 0: only at the end
    config.train.save_minutes = 0.0  # most minutes between checkpoints; 0: no limit
    config.train.keep = 3  # latest checkpoints kept besides the best
    config.train.tensorboard = True  # whether to write event files, which imports TensorFlow
    config.train.profile_start = 0  # first step of the profile
    config.train.profile_steps = 0  # number of profiled steps; 0: no profile

    # What is trained: in a decoder "all" or "lora"; in a composed model "bridge", "lora" or both;
    # (): the bridge and the low-rank update if there are any, otherwise all.
    config.train.trainable = ()

    # A low-rank update (LoRA) of the anchor's layers, or of the decoder in decoder.from.
    config.lora = ConfigDict()
    config.lora.rank = 0  # rank of the update; 0: no update
    config.lora.alpha = 0.0  # the update is scaled by alpha / rank; 0: by 1
    config.lora.targets = ()  # matrices: query, key, value, output, gate, up, down; (): all of them

    config.evaluate = ConfigDict()
    config.evaluate.tasks = ()  # registered tasks with a test split, or files of JSON lines
    config.evaluate.limit = 0  # most examples of each task; 0: all
    config.evaluate.max_new_tokens = 32  # longest answer, in tokens

    config.cache_compiled = ""  # folder of compiled programs; "": ~/.cache/calm_jax/xla
    return config


# Keys that may change when a run is resumed.
MAY_CHANGE = (
    "attention",
    "cache_compiled",
    "data.cache_dir",
    "evaluate",
    "mesh",
    "train.keep",
    "train.log_every",
    "train.loss_chunk",
    "train.num_steps",
    "train.profile_start",
    "train.profile_steps",
    "train.remat",
    "train.save_every",
    "train.save_minutes",
    "train.tensorboard",
    "train.validate_every",
    "weight_sharding",
)

_CHOICES = {
    "attention": ("auto", *BACKENDS),
    "optimizer.name": ("adamw", "adafactor", "muon"),
    "optimizer.schedule": ("cosine", "linear", "constant"),
    "train.remat": REMAT,
    "weight_sharding": tuple(WEIGHT_RULES),
}
_NEVER_NEGATIVE = ("data.", "evaluate.", "lora.", "optimizer.", "train.")  # all numbers in them
_LEAST = {
    "data.augment_length": 1,
    "data.length": 1,
    "evaluate.max_new_tokens": 1,
    "train.accumulate": 1,
    "train.batch_size": 1,
    "train.keep": 1,
    "train.log_every": 1,
    "train.num_steps": 1,
}
_MOST = {"optimizer.b1": 1, "optimizer.b2": 1, "optimizer.final_fraction": 1}


def validate(config: ConfigDict) -> None:
    """Checks a config as far as possible without its files and devices.

    Raises:
        CalmError: an unknown or missing key, a value of the wrong type or out of range, or values
            that contradict each other. The message names the keys and values.
    """
    if config.get("kind") not in ("decoder", "composed"):
        raise CalmError(f"kind is {config.get('kind')!r}; known are 'decoder' and 'composed'")
    _check_section(config, decoder_run() if config.kind == "decoder" else composed_run(), "")
    _check_ranges(flatten(to_dict(config)))
    train, optimizer = config.train, config.optimizer
    if train.batch_size % train.accumulate:
        raise CalmError(
            f"train.batch_size {train.batch_size} is not divisible by train.accumulate "
            f"{train.accumulate}"
        )
    if optimizer.warmup_steps >= train.num_steps:
        raise CalmError(
            f"optimizer.warmup_steps {optimizer.warmup_steps} is not less than train.num_steps "
            f"{train.num_steps}"
        )
    if train.profile_steps and train.profile_start >= train.num_steps:
        raise CalmError(
            f"train.profile_start {train.profile_start} is not less than train.num_steps "
            f"{train.num_steps}"
        )
    for split in ("train", "validation"):
        for entry in config.data[split]:
            check_entry(entry, split)
    if not config.data.train:
        raise CalmError("data.train is empty; name a task or a JSON-lines file")
    if optimizer.name == "adafactor":
        defaults = _common("decoder").optimizer
        for key in ("b1", "b2"):
            if optimizer[key] != defaults[key]:
                raise CalmError(f"optimizer.{key} is set, but optimizer.name is {optimizer.name!r}")
    if optimizer.schedule == "constant" and optimizer.final_fraction:
        raise CalmError(
            f"optimizer.final_fraction is {optimizer.final_fraction}, but optimizer.schedule is "
            "'constant'"
        )
    if not config.lora.rank and (config.lora.alpha or config.lora.targets):
        key = "alpha" if config.lora.alpha else "targets"
        raise CalmError(f"lora.{key} is set, but lora.rank is 0, so there is no update")
    if train.validate_every and not config.data.validation:
        raise CalmError(
            f"train.validate_every is {train.validate_every}, but data.validation is empty"
        )
    # A composed run identifies its models by fingerprint, so it must not change their weights.
    known = ("bridge", "lora") if config.kind == "composed" else ("all", "lora")
    for name in train.trainable:
        if name not in known:
            raise CalmError(
                f"train.trainable has {name!r}; known for a {config.kind} run are {known}"
            )
    if config.kind == "composed" and train.trainable:
        # A bridge or an update that is not trained is not saved, so it could not be loaded again.
        needed = {"bridge", "lora"} if config.lora.rank else {"bridge"}
        if set(train.trainable) != needed:
            raise CalmError(
                f"train.trainable is {tuple(train.trainable)} with lora.rank {config.lora.rank}; a "
                f"composed run trains all of {tuple(sorted(needed))}"
            )
    if config.lora.rank and config.kind == "decoder" and not config.decoder["from"]:
        raise CalmError(
            f"lora.rank is {config.lora.rank}, but decoder.from is empty: a low-rank update needs "
            "a trained decoder"
        )
    _check_composed(config) if config.kind == "composed" else _check_decoder(config)


def _check_decoder(config: ConfigDict) -> None:
    fields = to_dict(config.decoder)
    source = fields.pop("from")
    empty = _section(DecoderConfig, None)
    if source:
        for key, value in fields.items():
            if value != to_dict(empty)[key]:
                raise CalmError(f"decoder.{key} is {value!r}, but decoder.from {source!r} sets it")
        return
    for field in dataclasses.fields(DecoderConfig):
        if field.default is dataclasses.MISSING and fields[field.name] is None:
            raise CalmError(f"decoder.{field.name} is not set")
    if fields["weights"]:
        raise CalmError(f"decoder.weights is {fields['weights']!r}, which cannot be trained")
    DecoderConfig.from_dict(fields)


def _check_composed(config: ConfigDict) -> None:
    if not config.anchor:
        raise CalmError("anchor is empty; name a frozen folder")
    if not config.augments:
        raise CalmError("augments is empty; name at least one frozen folder")
    for number, path in enumerate(config.augments):
        if not isinstance(path, str) or not path:
            raise CalmError(f"augments[{number}] is {path!r}; it must name a frozen folder")
    for key in ("anchor_dtype", "augment_dtype"):
        if config[key] not in ("", *DTYPES):
            raise CalmError(f"{key} is {config[key]!r}; known are '', {', '.join(DTYPES)}")
    if not isinstance(config.composition, tuple | list):
        CompositionConfig.from_dict(to_dict(config.composition))
        return
    if len(config.composition) != len(config.augments):
        raise CalmError(
            f"composition has {len(config.composition)} configs for {len(config.augments)} augments"
        )
    for number, composition in enumerate(config.composition):
        try:
            CompositionConfig.from_dict(to_dict(composition))
        except CalmError as error:
            raise CalmError(f"augment {number}: {error}") from error


def _check_section(config: Mapping[str, Any], schema: ConfigDict, prefix: str) -> None:
    """Raises `CalmError` unless `config` has the keys and types of `schema`."""
    for key in config:
        if key not in schema:
            raise unknown_key(prefix + key, (prefix + known for known in schema))
    for key, default in schema.items():
        name = prefix + key
        if key not in config:
            raise CalmError(f"{name} is missing from the config")
        value, kind = config[key], schema.get_type(key)
        if name == "composition" and isinstance(value, tuple | list):
            for number, section in enumerate(value):
                _check_section(section, default, f"{name}[{number}].")
        elif isinstance(default, ConfigDict):
            if not isinstance(value, Mapping | ConfigDict):
                raise CalmError(f"{name} is {value!r}; it must be a section of keys")
            _check_section(value, default, f"{name}.")
        elif not _is_of_type(value, kind, may_be_none=default is None):
            raise CalmError(f"{name} is {value!r}; it must be of type {kind.__name__}")


def _is_of_type(value: Any, kind: type, *, may_be_none: bool) -> bool:
    if kind is type(None):  # a field of several types, which its dataclass checks
        return True
    if value is None:
        return may_be_none
    if isinstance(value, bool):
        return kind is bool
    accepted = {float: float | int, tuple: tuple | list}
    return isinstance(value, accepted.get(kind, kind))


def _check_ranges(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise CalmError(f"{key} is {value}; it must be a number")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise CalmError(f"{key} is {value!r}; known are {', '.join(map(repr, _CHOICES[key]))}")
        if not isinstance(value, int | float):
            continue
        least = _LEAST.get(key, 0 if key.startswith(_NEVER_NEGATIVE) else -math.inf)
        if value < least:
            raise CalmError(f"{key} is {value}; it must be at least {least}")
        if key in _MOST and value > _MOST[key]:
            raise CalmError(f"{key} is {value}; it must be at most {_MOST[key]}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(old, new) values, by dotted key, that make two configs (of `to_dict`) different runs.

    Keys in `MAY_CHANGE` are left out, and those without an effect in both, which a run may have
    been started with before `validate` refused them. An absent key counts as None.
    """
    old, new = flatten(old), flatten(new)
    without_effect = _without_effect(old) & _without_effect(new)
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and key not in without_effect
        and not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
    }


def _without_effect(flat: Mapping[str, Any]) -> set[str]:
    """Keys that the values of others make meaningless."""
    keys = set()
    if flat.get("optimizer.schedule") == "constant":
        keys.add("optimizer.final_fraction")
    if not flat.get("lora.rank"):
        keys |= {"lora.alpha", "lora.targets"}
    return keys


def _section(cls: type, values_of: Any = None) -> ConfigDict:
    """A typed section with the fields of a dataclass; fields without a default are None."""
    values = {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(cls)
    }
    if values_of is not None:
        values = values_of.to_dict()
    hints = typing.get_type_hints(cls)
    return ConfigDict(
        {name: _empty(hints[name]) if value is None else value for name, value in values.items()}
    )


def _empty(hint: Any) -> Any:
    """None, typed so that only values of `hint` replace it, if a flag can give such values."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    option = next(option for option in options if option is not type(None))
    if typing.get_origin(option) is typing.Literal:
        option = type(typing.get_args(option)[0])
    option = typing.get_origin(option) or option
    return placeholder(option) if option in (int, float, str, tuple) else None
