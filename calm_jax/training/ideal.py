"""The arithmetic that a training step of a bridge cannot do without, by the models' forms alone.

Products of matrices only, two FLOPs a multiply-add, attention at its full square. Nothing is traced
or compiled here, so what is can be held against it.
"""

import dataclasses
from collections.abc import Sequence

from calm_jax.models.bridge import heads
from calm_jax.models.config import CompositionConfig, DecoderConfig
from calm_jax.models.connections import plan_connections


@dataclasses.dataclass(frozen=True)
class IdealFlops:
    """FLOPs of one step, by part.

    Attributes:
        augments: forward, up to each one's last tap; no head.
        anchor_forward: once, with its head.
        anchor_backward: gradients of activations alone, of the head and of the layers above the
            first connected one.
        bridge_forward: every connection.
        bridge_backward: gradients of parameters and of activations.
        recomputed: what full rematerialisation adds: one more forward pass of the layers above the
            first connected one, and of the bridge.
    """

    augments: int
    anchor_forward: int
    anchor_backward: int
    bridge_forward: int
    bridge_backward: int
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
        """The whole step, under full rematerialisation."""
        return self.total + self.recomputed


def ideal_flops(
    anchor: DecoderConfig,
    augments: Sequence[DecoderConfig],
    compositions: Sequence[CompositionConfig],
    batch_size: int,
    length: int,
) -> IdealFlops:
    """FLOPs of one training step on `batch_size` rows of `length` tokens.

    Args:
        compositions: one for each of `augments`.

    Raises:
        CalmError: connections or heads that do not fit.
    """
    plan = plan_connections(compositions, anchor.num_layers, [form.num_layers for form in augments])
    tokens = batch_size * length
    first = plan.connections[0].anchor_layer
    above = (anchor.num_layers - 1 - first) * _Layer(anchor, length).forward
    above_backward = (anchor.num_layers - 1 - first) * _Layer(anchor, length).backward
    head = 2 * anchor.embed_dim * anchor.vocab_size
    bridges = [
        _Bridge(
            compositions[connection.augment],
            anchor,
            augments[connection.augment],
            length,
            is_first=connection.anchor_layer == first,
        )
        for connection in plan.connections
    ]
    bridge_forward = sum(bridge.forward for bridge in bridges)
    return IdealFlops(
        augments=tokens
        * sum(
            (taps[-1] + 1) * _Layer(form, length).forward
            for form, taps in zip(augments, plan.tap_layers, strict=True)
        ),
        anchor_forward=tokens * (anchor.num_layers * _Layer(anchor, length).forward + head),
        anchor_backward=tokens * (above_backward + head),
        bridge_forward=tokens * bridge_forward,
        bridge_backward=tokens * sum(bridge.backward for bridge in bridges),
        recomputed=tokens * (above + bridge_forward),
    )


class _Layer:
    """FLOPs a token of one layer; `backward` is of its activations alone."""

    def __init__(self, form: DecoderConfig, length: int):
        D, N, K, H = form.embed_dim, form.num_heads, form.num_kv_heads, form.head_dim
        projections = 2 * D * (N + 2 * K) * H + 2 * N * H * D
        mlp = (3 if form.gated_mlp else 2) * 2 * D * form.mlp_dim
        attention = _attention(N, H, length)
        self.forward = projections + mlp + attention
        self.backward = projections + mlp + 2 * attention


class _Bridge:
    """FLOPs a token of one connection.

    `is_first`: nothing below it learns, so the stream that it reads needs no gradient; nor does a
    tap ever. A norm in between needs that of its own result.
    """

    def __init__(
        self,
        config: CompositionConfig,
        anchor: DecoderConfig,
        augment: DecoderConfig,
        length: int,
        *,
        is_first: bool,
    ):
        D, E = anchor.embed_dim, augment.embed_dim
        N, H = heads(config, anchor)
        projection, into_heads = 2 * E * D, 2 * D * N * H
        output = into_heads if config.output_projection else 0
        attention = _attention(N, H, length)
        self.forward = projection + 3 * into_heads + output + attention
        self.backward = (
            (2 if config.norms else 1) * projection
            + (2 if config.norms or not is_first else 1) * into_heads
            + 2 * (2 * into_heads + output)
            + 2 * attention
        )


def _attention(num_heads: int, head_dim: int, length: int) -> int:
    """Logits and their product with the values, for one query; backward it is twice that."""
    return 2 * 2 * length * num_heads * head_dim
