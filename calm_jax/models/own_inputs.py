"""The inputs of augments that read other tokens than the anchor.

Axes: B batch, T anchor position, S augment position.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from calm_jax.errors import CalmError
from calm_jax.models.config import CompositionConfig
from calm_jax.models.inputs import Inputs


def own_inputs(inputs: Inputs, needed: Sequence[bool], *, cached: bool) -> list[Inputs | None]:
    """The `filled` own inputs of each augment; None if it reads the tokens of the anchor.

    Args:
        inputs: the anchor's, before they are filled.
        needed: for each augment, whether it cannot read the anchor's tokens.
        cached: whether there is a cache.

    Raises:
        CalmError: inputs are missing, too many, without an order, or with a cache.
    """
    if len(inputs.augments) > len(needed):
        raise CalmError(
            f"the inputs are for {len(inputs.augments)} augments, the model has {len(needed)}"
        )
    found = []
    for number, is_needed in enumerate(needed):
        own = inputs.of_augment(number)
        if own is None:
            if is_needed:
                raise CalmError(
                    f"augment {number} has another tokenizer than the anchor, so it needs inputs "
                    "of its own (Inputs.augments, calm_jax.data.own_tokens)"
                )
        elif own.order_BT is None:
            raise CalmError(f"the inputs of augment {number} have no order_BT")
        elif cached or inputs.order_BT is not None:
            raise CalmError(
                f"augment {number} has inputs of its own, which need the order of the anchor's "
                "array and no cache"
            )
        if own is not None:
            own = own.replace(order_BT=None).filled().replace(order_BT=own.order_BT)
        found.append(own)
    return found


def as_keys(own: Inputs, anchor: Inputs, config: CompositionConfig) -> Inputs:
    """An augment's own `filled` inputs as f_cross reads them, given the anchor's.

    With rotary positions, a token stands at the position of the anchor's token from which on it is
    read: a distance is a number of the anchor's tokens on both sides.
    """
    if not config.rotary:
        return own
    at = jax.vmap(lambda positions_T, order_S: positions_T.at[order_S].get(mode="clip"))
    return own.replace(positions_BT=at(anchor.positions_BT, own.order_BT).astype(jnp.int32))
