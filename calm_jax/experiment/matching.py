"""Baselines that are like the pair but for one thing: size for size, or the same form untrained."""

from collections.abc import Sequence

from flax import nnx
from ml_collections import ConfigDict

from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Decoder, DecoderConfig, compose
from calm_jax.models.lora import LoRAConfig, LoRAParam, add_lora
from calm_jax.models.parameters import count
from calm_jax.training.configuration import decoder_run

TOLERANCE = 0.01


def matched_rank(
    anchor: DecoderConfig,
    augments: Sequence[DecoderConfig],
    compositions: CompositionConfig | Sequence[CompositionConfig],
    targets: tuple[str, ...] = (),
) -> int:
    """The rank of an update of the anchor's `targets` that is as large as the bridge, within 1 %.

    Nothing is computed: shapes decide.

    Raises:
        CalmError: no rank comes as near; the message names the nearest and both numbers.
    """
    bridge = _size(nnx.eval_shape(lambda: _composed(anchor, augments, compositions).bridge))
    of_rank_1 = _size(nnx.eval_shape(lambda: _updated(anchor, targets)), LoRAParam)
    rank = max(1, round(bridge / of_rank_1))
    if abs(rank * of_rank_1 - bridge) > TOLERANCE * bridge:
        raise CalmError(
            f"the bridge has {bridge:,} parameters; a LoRA update of {targets or 'all matrices'} "
            f"has {rank * of_rank_1:,} at rank {rank}, the nearest; choose other targets"
        )
    return rank


def trained_as(bridge: ConfigDict) -> ConfigDict:
    """A decoder's run on the data of a bridge's run, with its optimizer, steps and evaluation."""
    config = decoder_run()
    for section in ("data", "optimizer", "train", "evaluate"):
        config[section] = bridge[section]
    return config


def untrained(config: ConfigDict) -> ConfigDict:
    """A decoder's run, changed in place to leave random weights: one step at a rate of nothing."""
    config.optimizer.learning_rate = 1e-30
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 0
    config.train.num_steps = 1
    return config


def _size(module: nnx.Module, kind: type = nnx.Param) -> int:
    return count(nnx.state(module, kind))


def _composed(anchor, augments, compositions):
    models = [Decoder(config, nnx.Rngs(0)) for config in (anchor, *augments)]
    return compose(models[0], models[1:], compositions, rngs=nnx.Rngs(0))


def _updated(anchor, targets):
    decoder = Decoder(anchor, nnx.Rngs(0))
    add_lora(decoder, LoRAConfig(1, targets=targets), nnx.Rngs(0))
    return decoder
