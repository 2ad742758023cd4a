"""How a forward pass is computed, never what: every choice gives the same numbers, within rounding.

Rematerialisation is of layers that a gradient flows through; elsewhere it costs and saves nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from calm_jax.errors import CalmError

REMAT = ("none", "full", "dots", "offload")

_INPUT = "layer_input"

# What takes a layer's weights out of a stack and casts them.
_OF_WEIGHTS = ("dynamic_slice", "squeeze", "reshape", "convert_element_type")


@dataclasses.dataclass(frozen=True)
class Execution:
    """Choices of one model.

    Attributes:
        attention: the backend of its attention; "auto": by the device and the inputs.
        remat: what the backward pass computes again instead of keeping it: "none"; "full",
            everything but each layer's input; "dots", everything but the products with weights;
            "offload", as "full" with the inputs in the host's memory.
        weight_sharding: the rules that weights are split by, a key of `sharding.WEIGHT_RULES`.
        unroll: without loops, as XLA counts the FLOPs of a loop's body once.
    """

    attention: str = "auto"
    remat: str = "none"
    weight_sharding: str = "fsdp"
    unroll: bool = False

    def rematerialised(self, layer: Callable[..., Any], *, in_loop: bool) -> Callable[..., Any]:
        """`layer`, a function whose first argument is the residual stream, under `remat`."""
        if self.remat == "none" and not in_loop:
            return layer
        policy = {
            "none": _all_but_weights,
            "full": None,
            "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[_INPUT],
                offload_src="device",
                offload_dst="pinned_host",
            ),
        }[self.remat]

        def named(x_BTD, *rest):
            return layer(checkpoint_name(x_BTD, _INPUT), *rest)

        # In a loop XLA cannot merge what is computed again with what was computed first.
        return jax.checkpoint(named, policy=policy, prevent_cse=self.unroll or not in_loop)


def _all_but_weights(primitive, *_, **__) -> bool:
    """Keeps all but what a layer makes of stacked weights: else copies of all of them are kept."""
    return primitive.name not in _OF_WEIGHTS


def check_remat(remat: str, device: jax.Device) -> None:
    """Raises `CalmError` when devices of that kind cannot rematerialise so."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    if remat == "offload" and "pinned_host" not in kinds:
        raise CalmError(
            f"train.remat is 'offload', but {device.platform} devices have no memory on the host: "
            f"theirs are {sorted(kinds)}"
        )
