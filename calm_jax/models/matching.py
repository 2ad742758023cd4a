"""Whether models fit each other: their vocabularies and their devices."""

from typing import Any

from calm_jax.errors import CalmError
from calm_jax.models.calling import array_of
from calm_jax.models.own_inputs import why_own


def check_vocabularies(ours: Any, our_name: str, theirs: Any, their_name: str) -> None:
    """Raises `CalmError` naming the first token that differs; accepts a missing vocabulary."""
    if ours is None or theirs is None:
        return
    difference = ours.first_difference(theirs)
    if difference is not None:
        index, our_token, their_token = difference
        raise CalmError(
            f"the vocabularies differ: token {index} is {our_token!r} for {our_name} and "
            f"{their_token!r} for {their_name}"
        )


def differ(ours: Any, theirs: Any) -> bool:
    """Whether both vocabularies are known and differ."""
    return None not in (ours, theirs) and ours.first_difference(theirs) is not None


def check_devices(anchor: Any, augment: Any, name: str) -> None:
    """Raises `CalmError` if both are committed to devices, but not to the same ones."""
    arrays = [array_of(model) for model in (anchor, augment)]
    if any(array is None or not array.committed for array in arrays):
        return
    ours, theirs = (sorted(device.id for device in x.sharding.device_set) for x in arrays)
    if ours != theirs:
        raise CalmError(
            f"the anchor is on devices {ours}, {name} on devices {theirs}; load both on one mesh"
        )


def check_shared(model: Any, what: str) -> None:
    """Raises `CalmError`, naming `what`, if an augment cannot read the tokens of its anchor.

    Other models pass.
    """
    own_tokens = getattr(model, "own_tokens", ())
    if True in own_tokens:
        number = own_tokens.index(True)
        why, _ = why_own(model.augments[number])
        raise CalmError(f"augment {number} {why}, which {what} does not support")
