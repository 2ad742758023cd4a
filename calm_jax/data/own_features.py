"""Batches for models with augments that read features: images at places in the anchor's text.

An *item*, such as an image, stands at one token of the anchor, its place. All of it can be read
from there on.

Axes: B row, S augment position, P position of an item, F features.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from calm_jax.data.dataset import features_key, own_keys
from calm_jax.errors import CalmError


class Placed(NamedTuple):
    """The items of one row, of one augment.

    Attributes:
        items: floats [P, F], in the order of their places.
        order: for each, the index of its place in the anchor's row.
    """

    items: Sequence[np.ndarray] = ()
    order: Sequence[int] = ()


def placed(ids: Sequence[int], place: int, items: Sequence[np.ndarray]) -> Placed:
    """The items of a row of the anchor's `ids`, one at each token `place`.

    Raises `CalmError` if there are more or fewer items than places.

    >>> placed([63, 43, 63, 61], place=63, items=[np.zeros((16, 4)), np.ones((16, 4))]).order
    [0, 2]
    """
    order = [index for index, token in enumerate(ids) if token == place]
    if len(order) != len(items):
        raise CalmError(
            f"the prompt has places (token {place}) for {len(order)} items, but {len(items)} are "
            "given"
        )
    return Placed(items, order)


def check_items(number: int, shape: tuple[int, int], items: Sequence[np.ndarray]) -> None:
    """Raises `CalmError` unless each item has the `shape` (P, F) that augment `number` reads."""
    for index, item in enumerate(items):
        if np.shape(item) != tuple(shape):
            raise CalmError(
                f"item {index} for augment {number} has the shape {np.shape(item)}, but the "
                f"augment reads {tuple(shape)}: positions and features"
            )


def own_arrays(
    number: int, shape: tuple[int, int], rows: Sequence[Placed], batch: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """An augment's items of each row, to add to a batch for `calm_jax.models.Inputs.of_batch`.

    Args:
        number: the augment's.
        shape: its `item_shape`, (P, F).
        rows: the items of each row; rows may have different numbers of them, or none.
        batch: the anchor's arrays [B, T] with seqio's decoder keys; items belong to the sequence,
            and to the prompt, of their places.

    Returns:
        float32 [B, S, F] with the key `features_key(number)`, and int32 [B, S] with those of
        `own_keys` for segments, order and prompt mask.

    Raises:
        CalmError: an item has another shape.
    """
    P, F = shape
    S = P * max(1, max(len(row.items) for row in rows))
    features_BSF = np.zeros((len(rows), S, F), np.float32)
    order_BS, real_BS = np.zeros((len(rows), S), np.int32), np.zeros((len(rows), S), np.int32)
    for index, row in enumerate(rows):
        check_items(number, shape, row.items)
        if len(row.items):
            count = P * len(row.items)
            features_BSF[index, :count] = np.concatenate(row.items)
            order_BS[index, :count] = np.repeat(row.order, P)
            real_BS[index, :count] = 1

    def at_places(key: str) -> np.ndarray:
        return np.take_along_axis(batch[key], order_BS, axis=1) * real_BS

    _, segments, order, _, prompt = own_keys(number)
    return {
        features_key(number): features_BSF,
        segments: at_places("decoder_segment_ids"),
        order: order_BS,
        prompt: at_places("decoder_causal_attention"),
    }
