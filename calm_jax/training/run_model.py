"""The models that a run's config names, in their trainable and frozen parts."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from calm_jax import sharding
from calm_jax.checkpoints import frozen as frozen_folders
from calm_jax.checkpoints.composed import load_frozen_models
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError
from calm_jax.models import ComposedDecoder, CompositionConfig, Decoder, DecoderConfig, compose
from calm_jax.models.attention_choice import Need, choose
from calm_jax.models.composed import check_vocabularies
from calm_jax.models.config import heads
from calm_jax.models.connections import plan_connections
from calm_jax.models.execution import Execution, check_remat
from calm_jax.models.lora import add_lora, lora_of
from calm_jax.models.parameters import Tree, module_tree
from calm_jax.models.parts import Parts
from calm_jax.training import config_keys


@dataclasses.dataclass(frozen=True)
class Described:
    """What can be said of a run's models before any weight is loaded.

    `identities`: role, place and fingerprint of each frozen model, the anchor first;
    `connections`: names of them, in the order of the metrics. Both are empty for a decoder.
    """

    vocabulary: Vocabulary
    identities: list[dict[str, Any]]
    connections: list[str]


@dataclasses.dataclass
class RunModel:
    """A model in its parts; `trainable` is None until it is made or restored."""

    parts: Parts
    trainable: Tree | None
    frozen: Tree


def describe_models(config: ConfigDict) -> Described:
    """Checks the models that a config names, without loading a weight.

    Raises:
        CalmError: a folder that is missing or damaged, connections or heads that do not fit, or
            vocabularies that differ or are larger than an embedding.
    """
    if config.kind == "composed":
        folders = [frozen_folders.describe(place) for place in (config.anchor, *config.augments)]
        roles = ["anchor", *(f"augment {k}" for k in range(len(config.augments)))]
        anchor, *augments = (folder.config for folder in folders)
        compositions = composition_configs(config)
        plan = plan_connections(
            compositions, anchor.num_layers, [form.num_layers for form in augments]
        )
        for composition in compositions:
            heads(composition, anchor)
    else:
        place = config.decoder["from"]
        folders = [frozen_folders.describe(place)] if place else []
        roles = ["decoder"]
    known = [(r, f.vocabulary) for r, f in zip(roles, folders, strict=False) if f.vocabulary]
    if config.vocabulary:
        known.insert(0, (f"vocabulary {config.vocabulary!r}", load_vocabulary(config.vocabulary)))
    elif config.kind == "composed" and folders[0].vocabulary is None:
        raise CalmError(
            f"the anchor {config.anchor} has no vocabulary, so what is trained could read no text; "
            "convert it with its tokenizer files beside it, or name a vocabulary"
        )
    if not known:
        raise CalmError("vocabulary is empty, and the model has none; name one")
    name, vocabulary = known[0]
    for role, other in known[1:]:
        check_vocabularies(vocabulary, name, other, f"the {role}")
    forms = [folder.config for folder in folders] or [decoder_config(config)]
    for role, form in zip(roles, forms, strict=True):
        if vocabulary.base_size > form.vocab_size:
            raise CalmError(
                f"the {role}'s vocab_size {form.vocab_size} is less than the "
                f"{vocabulary.base_size} tokens of {name}"
            )
    vocabulary.rows = min(form.vocab_size for form in forms)
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
    return Described(vocabulary, identities, plan.names if config.kind == "composed" else [])


def load_run_model(config: ConfigDict, mesh: jax.sharding.Mesh) -> RunModel:
    """The model to train, on the mesh. A new decoder's values are left to `init_decoder`.

    Raises `CalmError` as `set_execution`.
    """
    return _composed(config, mesh) if config.kind == "composed" else _decoder(config, mesh)


def set_execution(model: Decoder | ComposedDecoder, config: ConfigDict, device: jax.Device) -> None:
    """Says how each part of a model is computed, as the config asks and one of its devices allows.

    Raises `CalmError` when the devices cannot do what `attention` or `train.remat` says.
    """
    check_remat(config.train.remat, device)

    def execution(need: Need, remat: str) -> Execution:
        length, packed = config.data.length, config.data.pack
        backend = choose(config.attention, device, need, length=length, packed=packed)
        return Execution(backend, remat, config.weight_sharding)

    if isinstance(model, Decoder):
        need = Need.of_decoder("the decoder", model.config)
        model.execution = execution(need, config.train.remat)
        return
    anchor = model.anchor
    anchor.execution = execution(Need.of_decoder("the anchor", anchor.config), config.train.remat)
    # No gradient flows through an augment, so it has nothing to compute again.
    for number, augment in enumerate(model.augments):
        need = Need.of_decoder(f"augment {number}", augment.config)
        augment.execution = execution(need, "none")
    # The bridges share one backend; "chunked" does whatever any of them needs.
    needs = [Need.of_bridge(composition, anchor.config) for composition in model.configs]
    chosen = {execution(need, config.train.remat) for need in needs}
    model.execution = (
        chosen.pop() if len(chosen) == 1 else dataclasses.replace(chosen.pop(), attention="chunked")
    )


def init_decoder(config: ConfigDict, shardings: Tree) -> Tree:
    """Random values for a decoder, each born in its place."""
    seed, form = config.train.seed, decoder_config(config)
    return sharding.init_in_place(lambda: module_tree(Decoder(form, nnx.Rngs(seed))), shardings)


def decoder_config(config: ConfigDict) -> DecoderConfig:
    """The form of the decoder that a run trains from the start."""
    fields = config_keys.to_dict(config.decoder)
    fields.pop("from")
    return DecoderConfig.from_dict(fields)


def composition_configs(config: ConfigDict) -> list[CompositionConfig]:
    """One config an augment; a single one in the run's config is that of every augment."""
    given = config.composition
    given = given if isinstance(given, tuple | list) else [given] * len(config.augments)
    return [CompositionConfig.from_dict(config_keys.to_dict(fields)) for fields in given]


def frozen_dtypes(config: ConfigDict) -> list[str | None]:
    """The dtype to cast each frozen model to while loading it; None: as stored."""
    if config.kind != "composed":
        return [None]
    return [config.anchor_dtype or None, *[config.augment_dtype or None] * len(config.augments)]


def add_update(layers: nnx.Module, config: ConfigDict) -> None:
    """Gives the layers of a decoder, or of the anchor, the low-rank update of a run."""
    update = lora_of(config_keys.to_dict(config.lora))
    if update is not None:
        add_lora(layers, update, nnx.Rngs(config.train.seed + 1))


def _decoder(config: ConfigDict, mesh) -> RunModel:
    """A decoder to train: of random values, or a frozen folder, whole or by a low-rank update."""
    device = mesh.devices.flat[0]
    if not config.decoder["from"]:
        form = decoder_config(config)
        decoder = nnx.eval_shape(lambda: Decoder(form, nnx.Rngs(0)))
        set_execution(decoder, config, device)
        return RunModel(Parts(decoder, config.train.trainable), None, {})
    described = frozen_folders.describe(config.decoder["from"])
    rules = sharding.WEIGHT_RULES[config.weight_sharding]
    decoder = frozen_folders.load_described(described, mesh=mesh, rules=rules)
    return _in_place(decoder, decoder.layers, config, mesh)


def _composed(config: ConfigDict, mesh) -> RunModel:
    """A bridge to train between frozen folders."""
    configs = composition_configs(config)
    places = (config.anchor, *config.augments)
    rules = sharding.WEIGHT_RULES[config.weight_sharding]
    anchor, *augments = load_frozen_models(places, frozen_dtypes(config), configs, mesh, rules)
    composed = compose(anchor, augments, configs, rngs=nnx.Rngs(config.train.seed))
    return _in_place(composed, composed.anchor.layers, config, mesh)


def _in_place(
    model: Decoder | ComposedDecoder, layers: nnx.Module, config: ConfigDict, mesh
) -> RunModel:
    """The parts of a loaded model, `layers` of it with the run's update, laid out for training."""
    add_update(layers, config)
    set_execution(model, config, mesh.devices.flat[0])
    parts = Parts(model, config.train.trainable)
    trainable, frozen = parts.of(model)
    # A bridge is born by the default rules, an update on one device.
    shardings, _ = parts.shardings(mesh, sharding.WEIGHT_RULES[config.weight_sharding])
    return RunModel(parts, sharding.moved(trainable, shardings), frozen)
