"""The FLOPs that a training step of a bridge cannot avoid, from the models' configs alone.

Only matrix products count, a multiply-add as two FLOPs, attention at its full square. MFU is
defined by this number. Nothing is traced, so it checks `calm_jax.training.flops` independently.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from calm_jax.models.config import CompositionConfig, DecoderConfig, heads
from calm_jax.models.connections import plan_connections


@dataclasses.dataclass(frozen=True)
class IdealFlops:
    """FLOPs of one step, by part."""

    augments: int  # forward, each up to its last tap, without a head
    anchor_forward: int  # once, with its head
    # gradients of activations only, in the head and in the layers above the first connected one
    anchor_backward: int
    bridge_forward: int  # every connection
    bridge_backward: int  # gradients of parameters and of activations
    # added by full rematerialisation: a second forward pass of the layers above the first connected
    # one, and of the bridge
    recomputed: int

    @property
    def total(self) -> int:
        """The whole step, without rematerialisation."""
        return (
            self.augments
            + self.anchor_forward
            + self.anchor_backward
            + self.bridge_forward
            + self.bridge_backward
        )

    @property
    def total_rematerialised(self) -> int:
        return self.total + self.recomputed


def ideal_flops(
    anchor: DecoderConfig,
    augments: Sequence[DecoderConfig],
    compositions: Sequence[CompositionConfig],
    batch_size: int,
    length: int,
    own_lengths: Sequence[int | None] = (),
) -> IdealFlops:
    """FLOPs of one training step on `batch_size` rows of `length` tokens.

    Args:
        compositions: one for each of `augments`.
        own_lengths: tokens in a row of each augment with tokens of its own; None: it has none.

    Raises:
        CalmError: connections or heads that do not fit.
    """
    plan = plan_connections(compositions, anchor.num_layers, [a.num_layers for a in augments])
    tokens = batch_size * length
    first = plan.connections[0].anchor_layer
    layer, layers_above = _Layer(anchor, length), anchor.num_layers - 1 - first
    head = 2 * anchor.embed_dim * anchor.vocab_size
    read = [
        own or length for _, own in itertools.zip_longest(augments, own_lengths[: len(augments)])
    ]
    bridges = [
        _Bridge(
            compositions[connection.augment],
            anchor,
            augments[connection.augment],
            length,
            read[connection.augment],
            is_first=connection.anchor_layer == first,
        )
        for connection in plan.connections
    ]
    bridge_forward = sum(bridge.forward for bridge in bridges)
    return IdealFlops(
        augments=batch_size
        * sum(
            count * (taps[-1] + 1) * _Layer(augment, count).forward
            for augment, taps, count in zip(augments, plan.tap_layers, read, strict=True)
        ),
        anchor_forward=tokens * (anchor.num_layers * layer.forward + head),
        anchor_backward=tokens * (layers_above * layer.backward + head),
        bridge_forward=batch_size * bridge_forward,
        bridge_backward=batch_size * sum(bridge.backward for bridge in bridges),
        recomputed=tokens * layers_above * layer.forward + batch_size * bridge_forward,
    )


class _Layer:
    """FLOPs of one layer for each token; `backward` is for gradients of its activations only."""

    def __init__(self, config: DecoderConfig, length: int):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        projections = 2 * D * (N + 2 * K) * H + 2 * N * H * D
        mlp = (3 if config.gated_mlp else 2) * 2 * D * config.mlp_dim
        attention = _attention(N, H, length)
        self.forward = projections + mlp + attention
        self.backward = projections + mlp + 2 * attention


class _Bridge:
    """FLOPs of one connection for a row: `queries` tokens of the anchor, `keys` of the augment.

    A tap needs no gradient. Neither does the residual stream at the first connected layer
    (`is_first`), since nothing below it is trained. But a norm on either needs the gradient of its
    result, for its scale.
    """

    def __init__(
        self,
        config: CompositionConfig,
        anchor: DecoderConfig,
        augment: DecoderConfig,
        queries: int,
        keys: int,
        *,
        is_first: bool,
    ):
        D, E = anchor.embed_dim, augment.embed_dim
        N, H = heads(config, anchor)
        into_heads = 2 * D * N * H
        projection, keys_and_values = keys * 2 * E * D, keys * 2 * into_heads
        into_queries = queries * into_heads
        output = into_queries if config.output_projection else 0
        attention = queries * _attention(N, H, keys)
        self.forward = projection + keys_and_values + into_queries + output + attention
        self.backward = (
            (2 if config.norms else 1) * projection
            + (2 if config.norms or not is_first else 1) * into_queries
            + 2 * (keys_and_values + output)
            + 2 * attention
        )


def _attention(num_heads: int, head_dim: int, length: int) -> int:
    """FLOPs of one query's logits and its sum of values; the backward pass takes twice that."""
    return 2 * 2 * length * num_heads * head_dim
