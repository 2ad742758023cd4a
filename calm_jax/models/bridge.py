"""The bridge: every connection's cross-attention, the trainable parameters of a composed model."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax.models.config import CompositionConfig, DecoderConfig
from calm_jax.models.connections import ConnectionPlan, Round
from calm_jax.models.cross_attention import CrossAttention
from calm_jax.models.parameters import stacked


class Bridge(nnx.Module):
    """For each round its cross-attentions, stacked where the round is.

    `augment_widths` are the features of each augment's hidden states.

    The initial values of a connection depend on its number alone, not on how rounds are stacked.
    """

    def __init__(
        self,
        plan: ConnectionPlan,
        configs: Sequence[CompositionConfig],
        anchor: DecoderConfig,
        augment_widths: Sequence[int],
        rngs: nnx.Rngs,
    ):
        keys = jax.random.split(rngs.params(), len(plan.connections))
        number = {connection: index for index, connection in enumerate(plan.connections)}

        def crossings(round_: Round) -> nnx.List:
            made = []
            for entry in round_.entries:
                augment = entry[0].augment
                make = functools.partial(
                    CrossAttention, configs[augment], anchor, augment_widths[augment]
                )
                entry_keys = jnp.stack([keys[number[connection]] for connection in entry])
                made.append(stacked(make, entry_keys if round_.stacked else entry_keys[0]))
            return nnx.List(made)

        self.rounds = nnx.List([crossings(round_) for round_ in plan.rounds])
