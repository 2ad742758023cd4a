"""Batches for models whose augments have tokenizers of their own.

Axes: B row, T anchor position, S augment position.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm_jax.data.alignment import Aligned, Alignment
from calm_jax.data.dataset import own_keys
from calm_jax.data.rows import OwnSequences, Sequences
from calm_jax.data.vocabulary import Vocabulary, check_ids
from calm_jax.errors import CalmError


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


def alignments_of(model: Any) -> dict[int, Alignment]:
    """As `alignments`, of the vocabularies of a model and its augments."""
    augments = getattr(model, "augments", ())
    return alignments(model.vocabulary, [getattr(each, "vocabulary", None) for each in augments])


@dataclasses.dataclass(frozen=True)
class OwnTokens:
    """How an augment's own rows are made.

    Attributes:
        length: S, tokens in a row.
        where: names the data in errors.
    """

    number: int
    alignment: Alignment
    length: int
    where: str = ""

    def of(self, sequences: Sequences, counts: dict[str, int]) -> OwnSequences:
        """The tokens of the same sequences; each is cut after `length` of them.

        Adds to the numbers of sequences `cut` and, of these, the tokens of the `longest`. Raises
        `CalmError` for text that a tokenizer cannot spell, or an id outside the embedding.
        """
        ids, is_text_N = sequences.inputs(), sequences.is_text_N
        # The first input and those whose target is in the prompt; of plain text only the first.
        prompts_N = np.where(is_text_N, 1, sequences.prompts_N + 1)
        ends = [
            None if is_text else int(count)
            for is_text, count in zip(is_text_N, prompts_N, strict=True)
        ]
        try:
            rows = self.alignment.align(ids, ends, check=True)
        except CalmError as error:
            raise CalmError(f"{self.where}: {error}") from error
        lengths_N = np.array([len(row.ids) for row in rows], np.int64)
        counts["cut"] += int((lengths_N > self.length).sum())
        if counts["cut"]:
            counts["longest"] = max(counts["longest"], int(lengths_N.max(initial=0)))
        kept_N = np.minimum(lengths_N, self.length)

        def joined(column: int) -> np.ndarray:
            parts = (row[column][: self.length] for row in rows)
            return np.fromiter(itertools.chain.from_iterable(parts), np.int32, kept_N.sum())

        ids_M, order_M = joined(0), joined(1)
        vocabulary = self.alignment.augment
        if vocabulary.rows is not None:
            check_ids(ids_M, vocabulary.rows, f"{self.where}: {self.alignment.name}'s", vocabulary)
        is_prompt_M = order_M < np.repeat(prompts_N, kept_N)
        return OwnSequences(self.number, self.length, ids_M, order_M, is_prompt_M, kept_N)


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


def training_batch(
    found: Mapping[int, Alignment],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    length: int | None = None,
) -> dict[str, np.ndarray]:
    """One prompt and its answer in each row, with the loss on the answer alone.

    Args:
        found: as of `alignments`.
        prompts: the anchor's ids of each prompt, at least one.
        answers: those of its answer, the end token included.
        length: T; default: that of the longest row.

    Returns:
        as `batch`, with int32 [B, T] `decoder_target_tokens`, the next ids, and float32 [B, T]
        `decoder_loss_weights`.

    Raises:
        CalmError: a prompt is empty, a row does not fit into `length`, or a tokenizer cannot spell
            it.
    """
    pairs = list(zip(prompts, answers, strict=True))
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise CalmError(f"the prompt of row {row} is empty; it must have a token at least")
    rows, counts = [[*prompt, *answer] for prompt, answer in pairs], list(map(len, prompts))
    longest = max(map(len, rows)) - 1  # nothing follows the last id
    length = longest if length is None else length
    if longest > length:
        raise CalmError(f"a prompt with its answer takes {longest} tokens, but length is {length}")
    arrays = batch(found, [row[:-1] for row in rows], counts)
    for key in [key for key in arrays if key.startswith("decoder_")]:
        arrays[key] = np.pad(arrays[key], ((0, 0), (0, length - arrays[key].shape[1])))
    weights = [[0] * (len(prompt) - 1) + [1] * len(answer) for prompt, answer in pairs]
    return arrays | {
        "decoder_target_tokens": padded([row[1:] for row in rows], length),
        "decoder_loss_weights": padded(weights, length).astype(np.float32),
    }


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
    values = (
        [row.ids for row in rows],
        [[1] * len(row.ids) for row in rows],
        [row.order for row in rows],
        [range(len(row.ids)) for row in rows],
        [
            [int(order < (count or 0)) for order in row.order]
            for row, count in zip(rows, prompts, strict=True)
        ],
    )
    return {key: padded(lists, length) for key, lists in zip(own_keys(number), values, strict=True)}


def padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """int32 [B, length], zeros behind each row."""
    array = np.zeros((len(rows), length), np.int32)
    for row, values in zip(array, rows, strict=True):
        row[: len(values)] = values
    return array
