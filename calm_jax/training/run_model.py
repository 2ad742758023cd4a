"""The models that a run's config names, split into trainable and frozen arrays."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from calm_jax import sharding
from calm_jax.checkpoints import frozen as frozen_folders
from calm_jax.checkpoints.composed import load_frozen_models
from calm_jax.data.entries import own_length
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError
from calm_jax.models import ComposedDecoder, CompositionConfig, Decoder, DecoderConfig, compose
from calm_jax.models.attention_choice import Need, choose
from calm_jax.models.config import heads
from calm_jax.models.connections import plan_connections
from calm_jax.models.execution import Execution, check_remat
from calm_jax.models.lora import add_lora, lora_of
from calm_jax.models.matching import check_vocabularies, differ
from calm_jax.models.parameters import Tree, module_tree
from calm_jax.models.parts import Parts
from calm_jax.training import config_keys


@dataclasses.dataclass(frozen=True)
class Described:
    """What is known about a run's models before any weight is loaded.

    Attributes:
        identities: role, folder, dtype and fingerprint of each frozen model, the anchor first.
        connections: names of the connections, in the order of metrics; empty for a decoder.
        augments: the vocabulary of each augment; None where it is the anchor's or unknown.
    """

    vocabulary: Vocabulary
    identities: list[dict[str, Any]]
    connections: list[str]
    augments: tuple[Vocabulary | None, ...] = ()


@dataclasses.dataclass
class RunModel:
    """A model split in two; `trainable` is None until it is initialised or restored."""

    parts: Parts
    trainable: Tree | None
    frozen: Tree


def describe_models(config: ConfigDict) -> Described:
    """Checks the models that a config names, without loading any weights.

    Raises:
        CalmError: a folder is missing or damaged, connections or heads do not fit, a vocabulary is
            missing, contradicts `config.vocabulary` or is larger than an embedding, or an augment
            reads shorter texts than its rows.
    """
    if config.kind == "composed":
        folders = [frozen_folders.describe(path) for path in (config.anchor, *config.augments)]
        roles = ["anchor", *(f"augment {k}" for k in range(len(config.augments)))]
        anchor, *augments = (folder.config for folder in folders)
        compositions = composition_configs(config)
        plan = plan_connections(
            compositions, anchor.num_layers, [augment.num_layers for augment in augments]
        )
        for composition in compositions:
            heads(composition, anchor)
    else:
        path = config.decoder["from"]
        folders = [frozen_folders.describe(path)] if path else []
        roles = ["decoder"]
    first = folders[0].vocabulary if folders else None
    vocabulary, name = first, f"the {roles[0]}"
    if config.vocabulary:
        vocabulary, name = load_vocabulary(config.vocabulary), f"vocabulary {config.vocabulary!r}"
        check_vocabularies(vocabulary, name, first, f"the {roles[0]}")
    elif config.kind == "composed" and first is None:
        raise CalmError(
            f"the anchor {config.anchor} has no vocabulary, so the trained model could not read "
            "text; convert it with its tokenizer files in the same folder, or set vocabulary"
        )
    if vocabulary is None:
        raise CalmError("vocabulary is empty, and the model has none; set it")
    own = tuple(
        folder.vocabulary if differ(vocabulary, folder.vocabulary) else None
        for folder in folders[1:]
    )
    for role, folder, other in zip(roles[1:], folders[1:], own, strict=True):
        if folder.vocabulary is None:
            logging.warning("%s has no vocabulary; it is given the ids of %s", role, name)
        else:
            _check_length(
                folder.vocabulary, role, config.data, "augment_length" if other else "length"
            )
    if config.data.augment_length and not any(own):
        raise CalmError(
            f"data.augment_length is {config.data.augment_length}, but no augment has another "
            "tokenizer than the anchor; leave it out"
        )
    if any(own) and first is None:
        raise CalmError(
            f"the anchor {config.anchor} has no vocabulary, but augments have other ones; convert "
            "it with its tokenizer files in the same folder"
        )
    configs = [folder.config for folder in folders] or [decoder_config(config)]
    rows = []
    for role, model_config, other in zip(roles, configs, (None, *own), strict=True):
        if other is None:
            _check_rows(vocabulary, name, role, model_config)
            rows.append(model_config.vocab_size)
        else:
            _check_rows(other, "its tokenizer", role, model_config)
            other.rows = model_config.vocab_size
    vocabulary.rows = min(rows)
    if config.kind != "composed" and not config.lora.rank:
        return Described(vocabulary, [], [])  # nothing is frozen
    identities = [
        {
            "role": role,
            "place": str(folder.folder),
            "dtype": dtype,
            "fingerprint": frozen_folders.loaded_fingerprint(folder, dtype),
        }
        for role, folder, dtype in zip(roles, folders, frozen_dtypes(config), strict=True)
    ]
    names = plan.names if config.kind == "composed" else []
    return Described(vocabulary, identities, names, own)


def _check_rows(vocabulary: Vocabulary, name: str, role: str, config: DecoderConfig) -> None:
    if vocabulary.base_size > config.vocab_size:
        raise CalmError(
            f"the {role}'s vocab_size {config.vocab_size} is less than the "
            f"{vocabulary.base_size} tokens of {name}"
        )


def _check_length(vocabulary: Vocabulary, role: str, data: ConfigDict, key: str) -> None:
    """Raises `CalmError` if a tokenizer says that its model reads less than rows of `data[key]`."""
    length = data[key] or data.length
    most = vocabulary.published.config.get("model_max_length")
    if isinstance(most, int | float) and most < length:
        raise CalmError(
            f"{role} reads at most {most} tokens (model_max_length of its tokenizer), but its rows "
            f"have {length}; set data.{key} to {most}"
        )


def load_run_model(config: ConfigDict, mesh: jax.sharding.Mesh) -> RunModel:
    """The model to train, on the mesh; `init_decoder` makes the values of a new decoder.

    Raises `CalmError` as `set_execution`.
    """
    rules = sharding.WEIGHT_RULES[config.weight_sharding]
    device, trained = mesh.devices.flat[0], config.train.trainable
    if config.kind == "composed":
        configs = composition_configs(config)
        paths = (config.anchor, *config.augments)
        anchor, *augments = load_frozen_models(paths, frozen_dtypes(config), configs, mesh, rules)
        model = compose(anchor, augments, configs, rngs=nnx.Rngs(config.train.seed))
    elif source := config.decoder["from"]:
        described = frozen_folders.describe(source)
        model = frozen_folders.load_described(described, mesh=mesh, rules=rules)
    else:
        model = nnx.eval_shape(lambda: Decoder(decoder_config(config), nnx.Rngs(0)))
        set_execution(model, config, device)
        return RunModel(Parts(model, trained), None, {})
    add_update(model.anchor, config)
    length = own_length(config.data)
    own = [length if reads else None for reads in getattr(model, "own_tokens", ())]
    set_execution(model, config, device, own)
    parts = Parts(model, trained)
    trainable, frozen = parts.of(model)
    # Until now a bridge is sharded by the default rules, and an update is on one device.
    shardings, _ = parts.shardings(mesh, rules)
    return RunModel(parts, sharding.resharded(trainable, shardings), frozen)


def set_execution(
    model: Decoder | ComposedDecoder,
    config: ConfigDict,
    device: jax.Device,
    own_lengths: Sequence[int | None] = (),
) -> None:
    """Sets how each part of a model is computed, by the config and one of the devices.

    `own_lengths`: for each augment the tokens in a row of its own; None where it reads the
    anchor's, as all do by default.

    Raises `CalmError` if the devices do not support `attention` or `train.remat`.
    """
    check_remat(config.train.remat, device)

    def execution(need: Need, remat: str, own: int | None = None) -> Execution:
        length, packed = own or config.data.length, config.data.pack
        backend = choose(config.attention, device, need, length=length, packed=packed)
        return Execution(backend, remat, config.weight_sharding)

    if isinstance(model, Decoder):
        need = Need.of_decoder("the decoder", model.config)
        model.execution = execution(need, config.train.remat)
        return
    anchor = model.anchor
    anchor.execution = execution(Need.of_decoder("the anchor", anchor.config), config.train.remat)
    # No gradient flows through an augment, so there is nothing to rematerialise.
    for number, (augment, own) in enumerate(itertools.zip_longest(model.augments, own_lengths)):
        if isinstance(augment, Decoder):
            need = Need.of_decoder(f"augment {number}", augment.config)
            augment.execution = execution(need, "none", own)
    # All connections share one backend; "chunked" meets every need.
    needs = [Need.of_bridge(composition, anchor.config) for composition in model.configs]
    chosen = {execution(need, config.train.remat) for need in needs}
    model.execution = (
        chosen.pop() if len(chosen) == 1 else dataclasses.replace(chosen.pop(), attention="chunked")
    )


def init_decoder(config: ConfigDict, shardings: Tree) -> Tree:
    """Random values of a decoder, created with their shardings."""
    seed, decoder = config.train.seed, decoder_config(config)
    return sharding.init_sharded(lambda: module_tree(Decoder(decoder, nnx.Rngs(seed))), shardings)


def decoder_config(config: ConfigDict) -> DecoderConfig:
    """The config of a decoder that a run trains from random values."""
    fields = config_keys.to_dict(config.decoder)
    fields.pop("from")
    return DecoderConfig.from_dict(fields)


def composition_configs(config: ConfigDict) -> list[CompositionConfig]:
    """One config per augment; if the run has a single config, it is for every augment."""
    given = config.composition
    given = given if isinstance(given, tuple | list) else [given] * len(config.augments)
    return [CompositionConfig.from_dict(config_keys.to_dict(fields)) for fields in given]


def frozen_dtypes(config: ConfigDict) -> list[str | None]:
    """The dtype that each frozen model is cast to when loaded; None: as stored."""
    if config.kind != "composed":
        return [None]
    return [config.anchor_dtype or None, *[config.augment_dtype or None] * len(config.augments)]


def add_update(decoder: Decoder, config: ConfigDict) -> None:
    """Adds the low-rank update of a run, if any, to its decoder or anchor."""
    update = lora_of(config_keys.to_dict(config.lora))
    if update is not None:
        add_lora(decoder, update, nnx.Rngs(config.train.seed + 1))
