"""Batches for models whose augments have tokenizers of their own.

Axes: B row, T anchor position, S augment position.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from calm_jax.data.alignment import Aligned, Alignment
from calm_jax.data.vocabulary import Vocabulary


def alignments(
    anchor: Vocabulary | None, augments: Sequence[Vocabulary | None]
) -> dict[int, Alignment]:
    """The alignment of each augment, by its number, whose vocabulary is not the anchor's.

    Raises `CalmError` as `Alignment`.
    """
    return {
        number: Alignment(anchor, vocabulary, f"augment {number}")
        for number, vocabulary in enumerate(augments)
        if None not in (anchor, vocabulary) and anchor.fingerprint != vocabulary.fingerprint
    }


def batch(
    found: Mapping[int, Alignment],
    ids: Sequence[Sequence[int]],
    prompts: Sequence[int | None] | None = None,
    *,
    check: bool = False,
) -> dict[str, np.ndarray]:
    """One sequence of the anchor's ids in each row, and the augments' tokens for it.

    `Inputs.of_batch` takes the result. Rows are as long as the longest sequence.

    Args:
        found: as of `alignments`.
        prompts: for each row the number of ids of its prompt; None: all of them, for every row; an
            element may be None: there is no prompt.
        check: as for `Alignment.align`.

    Returns:
        int32 [B, T] with the decoder keys of inputs, and int32 [B, S] with the keys
        `augment_…_…` of each augment in `found`.
    """
    prompts = [len(row) for row in ids] if prompts is None else prompts
    length = max(map(len, ids))
    arrays = {
        "decoder_input_tokens": padded(ids, length),
        "decoder_segment_ids": padded([[1] * len(row) for row in ids], length),
        "decoder_positions": padded([range(len(row)) for row in ids], length),
        "decoder_causal_attention": padded([[1] * (count or 0) for count in prompts], length),
    }
    for number, alignment in found.items():
        arrays |= own_arrays(number, alignment.align(ids, prompts, check=check), prompts)
    return arrays


def own_arrays(
    number: int,
    rows: Sequence[Aligned],
    prompts: Sequence[int | None],
    length: int | None = None,
) -> dict[str, np.ndarray]:
    """An augment's tokens, one sequence in each row, as int32 [B, S] with its keys.

    `length` is S; default: that of the longest sequence.
    """
    length = max((len(row.ids) for row in rows), default=0) if length is None else length
    values = {
        "input_tokens": [row.ids for row in rows],
        "segment_ids": [[1] * len(row.ids) for row in rows],
        "order": [row.order for row in rows],
        "positions": [range(len(row.ids)) for row in rows],
        "causal_attention": [
            [int(order < (count or 0)) for order in row.order]
            for row, count in zip(rows, prompts, strict=True)
        ],
    }
    return {f"augment_{number}_{name}": padded(lists, length) for name, lists in values.items()}


def padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """int32 [B, length], zeros behind each row."""
    array = np.zeros((len(rows), length), np.int32)
    for row, values in zip(array, rows, strict=True):
        row[: len(values)] = values
    return array
