"""A run's model as abstract shapes, to check and plan it before any weight is loaded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from calm_jax import presets, sharding
from calm_jax.checkpoints import frozen
from calm_jax.data.entries import own_length
from calm_jax.models import Decoder, DecoderConfig, compose
from calm_jax.models.matching import differ
from calm_jax.models.parameters import SCALE, Tree, path_name
from calm_jax.models.parts import Parts
from calm_jax.models.quantized import QUANTIZERS
from calm_jax.training.optimizer import make_optimizer
from calm_jax.training.run_model import (
    add_update,
    composition_configs,
    decoder_config,
    frozen_dtypes,
    set_execution,
)
from calm_jax.training.step import Shardings

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """A run's model and optimizer, with the sharding of each array; it holds no array."""

    parts: Parts
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    shardings: Shardings

    def trees(self) -> tuple[Tree, Any, Tree]:
        """Shapes of the trainable tree, the optimizer state and the frozen tree."""
        trainable, frozen_tree = self.parts.abstract()
        return trainable, jax.eval_shape(self.optimizer.init, trainable), frozen_tree


def abstract_run(config: ConfigDict, mesh: Mesh, device: jax.Device) -> AbstractRun:
    """The run of a config on a mesh of devices like `device`.

    Raises:
        CalmError: models or connections that do not fit, a parameter that the mesh cannot divide,
            or an `attention` or `train.remat` that the device does not support.
    """
    parts = abstract_parts(config, device)
    projections = parts.structure.projections()
    optimizer, schedule = make_optimizer(config.optimizer, config.train.num_steps, projections)
    rules = sharding.WEIGHT_RULES[config.weight_sharding]
    return AbstractRun(parts, optimizer, schedule, Shardings.of(parts, optimizer, mesh, rules))


def abstract_parts(config: ConfigDict, device: jax.Device) -> Parts:
    """The model of a config as shapes; raises as `abstract_run`, apart from mesh errors."""

    def make():
        first, *augments = map(_decoder, decoder_configs(config))
        add_update(first, config)
        if config.kind != "composed":
            return first
        return compose(first, augments, composition_configs(config), rngs=nnx.Rngs(0))

    model = nnx.eval_shape(make)
    set_execution(model, config, device, own_lengths(config))
    return Parts(model, config.train.trainable)


def decoder_configs(config: ConfigDict) -> list[DecoderConfig]:
    """Configs of the decoder, or of the anchor and every augment, as `calm train` loads them.

    Raises `CalmError` if a folder is missing or damaged, or a preset is unknown.
    """
    if config.kind != "composed":
        source = config.decoder["from"]
        given = frozen.describe(source).config if source else decoder_config(config)
        return [given if config.lora.rank else dataclasses.replace(given, weights=None)]
    paths = (config.anchor, *config.augments)
    return [
        _cast(_frozen_config(path), dtype)
        for path, dtype in zip(paths, frozen_dtypes(config), strict=True)
    ]


def own_lengths(config: ConfigDict) -> list[int | None]:
    """For each augment, the tokens in a row of its own; None if it reads those of the anchor.

    A preset has no tokenizer: if `data.augment_length` is set, one of another vocabulary's size has
    tokens of its own.
    """
    if config.kind != "composed":
        return []
    length = own_length(config.data)
    return [length if _reads_its_own(config, path) else None for path in config.augments]


def _reads_its_own(config: ConfigDict, augment: str) -> bool:
    paths = (config.anchor, augment)
    if any(map(presets.is_preset, paths)):
        ours, theirs = (_frozen_config(path).vocab_size for path in paths)
        return config.data.augment_length is not None and ours != theirs
    return differ(*(frozen.describe(path).vocabulary for path in paths))


def _frozen_config(path: str) -> DecoderConfig:
    if presets.is_preset(path):
        return DecoderConfig.from_dict(presets.fields(path))
    return frozen.describe(path).config


def _decoder(config: DecoderConfig) -> Decoder:
    """A decoder with the dtypes of a loaded one: those of integer matrices and scales are kept."""

    def loaded(path, x: jax.Array) -> jax.Array:
        is_scale = path_name(path).removesuffix("/value").endswith(SCALE)
        kept = is_scale or jnp.issubdtype(x.dtype, jnp.integer)
        return x if kept else x.astype(config.dtype)

    decoder = Decoder(config, nnx.Rngs(0))
    nnx.update(decoder, jax.tree.map_with_path(loaded, nnx.state(decoder)))
    return decoder


def _cast(config: DecoderConfig, dtype: str | None) -> DecoderConfig:
    if dtype in QUANTIZERS:
        return dataclasses.replace(config, weights=dtype)
    return config if dtype is None else dataclasses.replace(config, dtype=dtype)
