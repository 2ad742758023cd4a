"""The models that a run's config names, in their trainable and frozen parts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from calm_jax import sharding
from calm_jax.checkpoints import frozen as frozen_folders
from calm_jax.checkpoints.composed import identities
from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Decoder, DecoderConfig, compose
from calm_jax.models.parameters import Tree, module_tree
from calm_jax.training import configuration
from calm_jax.training.step import Parts


@dataclasses.dataclass
class RunModel:
    """A model in its parts; `trainable` is None until it is made or restored."""

    parts: Parts
    trainable: Tree | None
    frozen: Tree
    identities: list[dict[str, Any]]
    vocabulary: Vocabulary


def make_model(config: ConfigDict, mesh: jax.sharding.Mesh) -> RunModel:
    """The model to train, on the mesh. A new decoder's values are left to `init_decoder`."""
    return _composed(config, mesh) if config.kind == "composed" else _decoder(config, mesh)


def init_decoder(config: ConfigDict, shardings: Tree) -> Tree:
    """Random values for a decoder, each born in its place."""
    seed, form = config.train.seed, decoder_config(config)
    return sharding.init_in_place(lambda: module_tree(Decoder(form, nnx.Rngs(seed))), shardings)


def decoder_config(config: ConfigDict) -> DecoderConfig:
    """The form of the decoder that a run trains from the start."""
    fields = configuration.to_dict(config.decoder)
    fields.pop("from")
    return DecoderConfig.from_dict(fields)


def composition_configs(config: ConfigDict) -> list[CompositionConfig]:
    """One config an augment; a single one in the run's config is that of every augment."""
    given = config.composition
    given = given if isinstance(given, tuple | list) else [given] * len(config.augments)
    return [CompositionConfig.from_dict(configuration.to_dict(fields)) for fields in given]


def _decoder(config: ConfigDict, mesh) -> RunModel:
    """A decoder to train whole: from random values, or from a frozen folder in float32."""
    vocabulary = Vocabulary.load(config.vocabulary) if config.vocabulary else None
    if config.decoder["from"]:
        decoder = frozen_folders.load(config.decoder["from"], mesh=mesh)
        vocabulary = vocabulary or decoder.vocabulary
        parts = Parts(decoder)
        trainable = jax.tree.map(lambda x: x.astype(jnp.float32), module_tree(decoder))
    else:
        form = decoder_config(config)
        parts, trainable = Parts(nnx.eval_shape(lambda: Decoder(form, nnx.Rngs(0)))), None
    if vocabulary is None:
        raise CalmError("vocabulary is empty; name one")
    if vocabulary.size > parts.structure.abstract()["embedding"].shape[0]:
        raise CalmError(
            f"decoder.vocab_size {parts.structure.abstract()['embedding'].shape[0]} is less than "
            f"the {vocabulary.size} tokens of the vocabulary {config.vocabulary!r}"
        )
    return RunModel(parts, trainable, {}, [], vocabulary)


def _composed(config: ConfigDict, mesh) -> RunModel:
    """A bridge to train between frozen folders."""
    anchor = frozen_folders.load(config.anchor, mesh=mesh)
    augments = [frozen_folders.load(place, mesh=mesh) for place in config.augments]
    composed = compose(
        anchor, augments, composition_configs(config), rngs=nnx.Rngs(config.train.seed)
    )
    parts = Parts(composed)
    trainable, frozen = parts.of(composed)
    vocabulary = Vocabulary.load(config.vocabulary) if config.vocabulary else composed.vocabulary
    if vocabulary is None:
        raise CalmError(f"vocabulary is empty, and {config.anchor} has none; name one")
    return RunModel(parts, trainable, frozen, identities(composed), vocabulary)
