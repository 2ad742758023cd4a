"""How a forward pass is computed; no choice here changes its numbers, except by rounding."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from calm_jax.errors import CalmError

REMAT = ("none", "full", "dots", "offload")

_INPUT = "layer_input"

# The operations that take a layer's weights out of a stack and cast them.
_OF_WEIGHTS = ("dynamic_slice", "squeeze", "reshape", "convert_element_type")


@dataclasses.dataclass(frozen=True)
class Execution:
    """Choices of one model.

    Attributes:
        attention: the attention backend; "auto": chosen by device and inputs.
        remat: what the backward pass recomputes instead of storing it: "none"; "full", all but the
            input of each layer; "dots", all but products with weights; "offload", as "full" with
            the inputs in host memory. It has no effect without gradients.
        weight_sharding: which rules shard the weights, a key of `sharding.WEIGHT_RULES`.
        unroll: whether to unroll loops, since XLA counts the FLOPs of a loop's body only once.
    """

    attention: str = "auto"
    remat: str = "none"
    weight_sharding: str = "fsdp"
    unroll: bool = False

    def rematerialised(self, layer: Callable[..., Any], *, in_loop: bool) -> Callable[..., Any]:
        """`layer`, a function whose first argument is the residual stream, with `remat` applied."""
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

        # Inside a loop XLA cannot merge the recomputation with the first computation anyway.
        return jax.checkpoint(named, policy=policy, prevent_cse=self.unroll or not in_loop)


def _all_but_weights(primitive, *_, **__) -> bool:
    """Stores all but a layer's slice of stacked weights: storing these would copy all weights."""
    return primitive.name not in _OF_WEIGHTS


def check_remat(remat: str, device: jax.Device) -> None:
    """Raises `CalmError` if devices of that kind do not support `remat`."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    if remat == "offload" and "pinned_host" not in kinds:
        raise CalmError(
            f"train.remat is 'offload', but {device.platform} devices have no pinned host memory, "
            f"only {sorted(kinds)}"
        )


@jax.custom_vjp
def gradients_at_once(tree):
    """`tree`, whose gradients are all computed before the backward pass continues.

    Otherwise XLA may postpone a bridge's own gradient until the backward pass of all layers below,
    and keep the activations for it until then.
    """
    return tree


gradients_at_once.defvjp(
    lambda tree: (tree, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),)
)
