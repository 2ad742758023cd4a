"""The inputs of augments that read other tokens than the anchor, or features.

Axes: B batch, T anchor position, S augment position, F features.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from calm_jax.errors import CalmError
from calm_jax.models.config import CompositionConfig
from calm_jax.models.inputs import Inputs
from calm_jax.models.taps import Augment, item_shape


def own_inputs(
    inputs: Inputs, augments: Sequence[Augment], needed: Sequence[bool], *, cached: bool
) -> list[Inputs | None]:
    """The `filled` own inputs of each augment; None if it reads the tokens of the anchor.

    Args:
        inputs: the anchor's, before they are filled.
        needed: for each augment, whether it cannot read the anchor's tokens.
        cached: whether there is a cache, in which `read_own` puts own inputs.

    Raises:
        CalmError: inputs are missing, too many, without an order, with a cache, or of features
            that the augment does not take.
    """
    if len(inputs.augments) > len(needed):
        raise CalmError(
            f"the inputs are for {len(inputs.augments)} augments, the model has {len(needed)}"
        )
    found = []
    for number, (augment, is_needed) in enumerate(zip(augments, needed, strict=True)):
        own, shape = inputs.of_augment(number), item_shape(augment)
        if own is None:
            if is_needed and not cached:
                why, maker = why_own(augment)
                raise CalmError(
                    f"augment {number} {why}, so it needs inputs of its own (Inputs.augments, "
                    f"calm_jax.data.{maker})"
                )
        elif own.order_BT is None:
            raise CalmError(f"the inputs of augment {number} have no order_BT")
        elif cached or inputs.order_BT is not None:
            raise CalmError(
                f"augment {number} has inputs of its own, which need the order of the anchor's "
                "array and no cache; read_own puts them into one"
            )
        if own is not None:
            if shape is not None:
                _check_features(own, shape, f"augment {number}")
            own = own.replace(order_BT=None).filled().replace(order_BT=own.order_BT)
        found.append(own)
    return found


def why_own(augment: Augment) -> tuple[str, str]:
    """Why an augment cannot read the anchor's tokens, and the module that makes its inputs."""
    if item_shape(augment) is None:
        return "has another tokenizer than the anchor", "own_tokens"
    return "reads features, not tokens", "own_features"


def _check_features(own: Inputs, shape: tuple[int, int], name: str) -> None:
    """Raises `CalmError` unless the inputs are items of this shape."""
    positions, width = shape
    if own.features_BTD is None:
        raise CalmError(f"{name} reads features, but its inputs have tokens alone")
    _, found, found_width = own.features_BTD.shape
    if found_width != width:
        raise CalmError(f"{name} reads {width} features a position, its inputs have {found_width}")
    if found % positions:
        raise CalmError(
            f"{name} reads items of {positions} positions, but its inputs have {found}, which "
            f"{positions} does not divide"
        )
    if own.order_BT.shape[1] != found:
        raise CalmError(
            f"{name} has features at {found} positions, but an order of {own.order_BT.shape[1]}"
        )


def as_keys(own: Inputs, anchor: Inputs, config: CompositionConfig) -> Inputs:
    """An augment's own `filled` inputs as f_cross reads them, given the anchor's.

    With rotary positions, a token stands at the position of the anchor's token from which on it is
    read: a distance is a number of the anchor's tokens on both sides.
    """
    if not config.rotary:
        return own
    at = jax.vmap(lambda positions_T, order_S: positions_T.at[order_S].get(mode="clip"))
    return own.replace(positions_BT=at(anchor.positions_BT, own.order_BT).astype(jnp.int32))
