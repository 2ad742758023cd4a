"""Sequences of token ids, laid out in rows of one length."""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Self

import numpy as np

from calm_jax.data.dataset import DTYPES, own_keys

# Sequences that are read, tokenised and packed together.
CHUNK = 8192

# Rows that are open at a time: a sequence goes into the first of them that has room for it; if
# none has, all are closed.
OPEN_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Sequences:
    """N sequences with M target ids in total; each is a prompt and what follows it.

    Attributes:
      ids_M: int32, the targets, one sequence after another.
      lengths_N: the number of targets in each sequence.
      prompts_N: how many of these targets, from the first on, belong to the prompt.
      before_N: int32, the input from which the first target of each sequence is predicted.
      is_text_N: bool, whether a sequence has no prompt; such a sequence may be split.
      start_id: the first input of every part of a split sequence; None: the id before the part.
    """

    ids_M: np.ndarray
    lengths_N: np.ndarray
    prompts_N: np.ndarray
    before_N: np.ndarray
    is_text_N: np.ndarray
    start_id: int | None

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        start_ids: Sequence[int] = (),
    ) -> Self:
        """Sequences of `start_ids`, a prompt and its answer.

        Without `start_ids` the first id of a sequence is only an input: nothing precedes it, so it
        cannot be predicted.
        """
        if head := list(start_ids[1:]):
            prompts = [[*head, *prompt] for prompt in prompts]
        is_text_N = np.array([not prompt for prompt in prompts], bool)
        prompts_N = np.fromiter(map(len, prompts), np.int64, len(prompts))
        lengths_N = prompts_N + np.fromiter(map(len, answers), np.int64, len(answers))
        pairs = itertools.chain.from_iterable(zip(prompts, answers, strict=True))
        ids_M = np.fromiter(itertools.chain.from_iterable(pairs), np.int32, lengths_N.sum())
        if start_ids:
            before_N = np.full(len(lengths_N), start_ids[0], np.int32)
            return cls(ids_M, lengths_N, prompts_N, before_N, is_text_N, start_ids[0])
        is_first_M = _within(lengths_N) == 0
        before_N = np.zeros(len(lengths_N), np.int32)
        before_N[lengths_N > 0] = ids_M[is_first_M]
        lengths_N, prompts_N = (np.maximum(count - 1, 0) for count in (lengths_N, prompts_N))
        return cls(ids_M[~is_first_M], lengths_N, prompts_N, before_N, is_text_N, None)

    def __len__(self) -> int:
        return len(self.lengths_N)

    def continued(self, length: int) -> Self:
        """The same targets; text is split into sequences of at most `length` targets."""
        pieces_N = np.where(self.is_text_N, np.maximum(-(-self.lengths_N // length), 1), 1)
        piece_P = _within(pieces_N)
        lengths_P, prompts_P, before_P, is_text_P = (
            np.repeat(of_N, pieces_N)
            for of_N in (self.lengths_N, self.prompts_N, self.before_N, self.is_text_N)
        )
        lengths_P = np.where(is_text_P, np.minimum(lengths_P - piece_P * length, length), lengths_P)
        if self.start_id is None:
            first_P = np.cumsum(lengths_P) - lengths_P
            before_P[piece_P > 0] = self.ids_M[first_P[piece_P > 0] - 1]
        return dataclasses.replace(
            self,
            lengths_N=lengths_P,
            prompts_N=prompts_P,
            before_N=before_P,
            is_text_N=is_text_P,
        )

    def cut(self, length: int) -> Self:
        """The first `length` targets of each sequence."""
        kept_N = np.minimum(self.lengths_N, length)
        return dataclasses.replace(
            self,
            ids_M=self.ids_M[_within(self.lengths_N) < np.repeat(kept_N, self.lengths_N)],
            lengths_N=kept_N,
            prompts_N=np.minimum(self.prompts_N, length),
        )

    def inputs(self) -> list[list[int]]:
        """The input ids of each sequence."""
        ends = np.cumsum(self.lengths_N)
        ids = [part.tolist() for part in np.split(self.ids_M, ends[:-1])] if len(self) else []
        before = self.before_N.tolist()
        return [
            [first, *part[:-1]] if part else [] for first, part in zip(before, ids, strict=True)
        ]

    def rows(
        self, length: int, pack: bool, own: "Sequence[OwnSequences]" = ()
    ) -> dict[str, np.ndarray]:
        """The sequences in rows [R, length] as `DTYPES`; none may be longer than a row.

        Packing gives the rows of grain's `FirstFitPackIterDataset`, which takes a hundred times as
        long. `own` are the same sequences for augments with tokens of their own, whose arrays are
        added: a row has the same sequences for each of them.
        """
        lengths_NK = np.stack([self.lengths_N, *(each.lengths_N for each in own)], axis=1)
        if pack:
            row_N, start_NK, segment_N = _first_fit(lengths_NK, [length, *(x.length for x in own)])
        else:
            row_N, segment_N = np.arange(len(self)), np.ones(len(self), np.int64)
            start_NK = np.zeros_like(lengths_NK)
        start_N = start_NK[:, 0]
        within_M = _within(self.lengths_N)
        place_M = np.repeat(row_N * length + start_N, self.lengths_N) + within_M
        inputs_M = np.roll(self.ids_M, 1)
        inputs_M[within_M == 0] = self.before_N[self.lengths_N > 0]
        values = {
            "inputs": inputs_M,
            "targets": self.ids_M,
            "segment_ids": np.repeat(segment_N, self.lengths_N),
            "prompt": within_M < np.repeat(self.prompts_N, self.lengths_N),
        }
        count = int(row_N.max(initial=-1)) + 1
        rows = {name: np.zeros((count, length), dtype) for name, dtype in DTYPES.items()}
        for name, values_M in values.items():
            rows[name].reshape(-1)[place_M] = values_M
        for number, each in enumerate(own, 1):
            rows |= each.rows(count, row_N, start_NK[:, number], segment_N, start_N)
        return rows


@dataclasses.dataclass(frozen=True)
class OwnSequences:
    """N sequences in the tokens of an augment, as `calm_jax.data.alignment` gives them.

    Attributes:
      ids_M, order_M: the tokens, one sequence after another, and their order in the sequence.
      is_prompt_M: bool, whether a token is read from a token of the prompt on.
      lengths_N: the number of tokens in each sequence.
    """

    number: int
    length: int
    ids_M: np.ndarray
    order_M: np.ndarray
    is_prompt_M: np.ndarray
    lengths_N: np.ndarray

    def rows(
        self,
        count: int,
        row_N: np.ndarray,
        start_N: np.ndarray,
        segment_N: np.ndarray,
        anchor_start_N: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """The sequences in `count` rows, int32 [R, length], with the keys of `own_keys`.

        Args:
            row_N, start_N, segment_N: where each sequence is, and its segment.
            anchor_start_N: where it begins in the anchor's row.
        """
        within_M = _within(self.lengths_N)
        place_M = np.repeat(row_N * self.length + start_N, self.lengths_N) + within_M
        order_M = self.order_M + np.repeat(anchor_start_N, self.lengths_N)
        segments_M = np.repeat(segment_N, self.lengths_N)
        values = (self.ids_M, segments_M, order_M, within_M, self.is_prompt_M)
        rows = {}
        for key, values_M in zip(own_keys(self.number), values, strict=True):
            rows[key] = np.zeros((count, self.length), np.int32)
            rows[key].reshape(-1)[place_M] = values_M
        return rows


def _within(lengths_N: np.ndarray) -> np.ndarray:
    """The position of every id in its sequence [M]."""
    return np.arange(lengths_N.sum()) - np.repeat(np.cumsum(lengths_N) - lengths_N, lengths_N)


def _first_fit(
    lengths_NK: np.ndarray, most: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each sequence its row, its first positions there, and its number in the row, from 1.

    A sequence has K lengths, and a row room for `most` of each. The results are [N], [N, K], [N].
    """
    room_K = np.array(most)
    free_RK, numbers = np.tile(room_K, (OPEN_ROWS, 1)), [0] * OPEN_ROWS
    closed, found, starts = 0, [], []
    for needed_K in lengths_NK:
        fits_R = (free_RK >= needed_K).all(axis=1)
        row = int(np.argmax(fits_R))
        if not fits_R[row]:
            closed += OPEN_ROWS
            free_RK[:], numbers, row = room_K, [0] * OPEN_ROWS, 0
        numbers[row] += 1
        starts.append(room_K - free_RK[row])
        free_RK[row] -= needed_K
        found.append((closed + row, numbers[row]))
    row_N, segment_N = np.array(found, np.int64).reshape(-1, 2).T
    return row_N, np.array(starts, np.int64).reshape(-1, len(room_K)), segment_N


class RowWriter:
    """Appends rows [?, T] to a .npy file whose number of rows is known only at the end."""

    def __init__(self, path: pathlib.Path, length: int, dtype: type):
        self._file = open(path, "wb")  # noqa: SIM115 (`__exit__` closes it)
        self._length, self._dtype, self._rows = length, np.dtype(dtype), 0
        self._header()

    def _header(self) -> None:
        # numpy leaves room in the header for the first axis to grow: the header keeps its length.
        shape = (self._rows, self._length)
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, description)

    def append(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self._rows += len(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._file:
            self._file.seek(0)
            self._header()
