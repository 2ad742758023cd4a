"""The rank of a low-rank update that has as many parameters as a bridge."""

from collections.abc import Sequence

from flax import nnx

from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Decoder, DecoderConfig, compose
from calm_jax.models.lora import LoRAConfig, LoRAParam, add_lora
from calm_jax.models.parameters import count

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


def _size(module: nnx.Module, kind: type = nnx.Param) -> int:
    return count(nnx.state(module, kind))


def _composed(anchor, augments, compositions):
    models = [Decoder(config, nnx.Rngs(0)) for config in (anchor, *augments)]
    return compose(models[0], models[1:], compositions, rngs=nnx.Rngs(0))


def _updated(anchor, targets):
    decoder = Decoder(anchor, nnx.Rngs(0))
    add_lora(decoder, LoRAConfig(1, targets=targets), nnx.Rngs(0))
    return decoder
