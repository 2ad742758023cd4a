"""Makes augments with inputs of their own read them, before the anchor's tokens that may see them.

The host makes these inputs of each row's tokens, and hands them to the devices in chunks of their
own. A model without such augments needs nothing of this.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from calm_jax.data.alignment import Alignment
from calm_jax.data.own_features import Placed
from calm_jax.data.own_tokens import alignments_of
from calm_jax.decoding import steps
from calm_jax.decoding.chunks import bucket, buckets
from calm_jax.decoding.memory import check_grows
from calm_jax.decoding.own_rows import Items, Reading, Text, own_chunk
from calm_jax.decoding.requests import Request, Row
from calm_jax.decoding.state import State
from calm_jax.models.taps import item_shape

LEAST = 16  # tokens; numbers of slots are multiples of it
SHORTEST = 8  # tokens of the shortest chunk: most of an anchor's tokens close fewer


class OwnReading:
    """Reads for all augments of a model that have inputs of their own.

    How many inputs a row will have is not known before: their slots are an estimate, and grow.

    Args:
        rows: number of rows of the state.
        reads: the ascending numbers of the anchor's slots that programs read; the last one: all.
            As large a part is read of the slots of an augment's tokens; of items all are read.
        chunks: the ascending lengths of chunks.
        at_once: most positions in a chunk of several rows.
        dtype: dtype of the caches.

    Attributes:
        shapes: the `item_shape` of each augment that reads features, by its number.
        slots: for each augment, by its number, how many of its inputs a row has room for.
        follow: the numbers of augments that read answers too, not only prompts.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        reads: Sequence[int],
        chunks: Sequence[int],
        at_once: int,
        dtype: Any,
    ):
        self._model, self._rows, self._dtype = model, rows, dtype
        self._reads, self._at_once = reads, at_once
        self._chunks = [size for size in chunks if size >= min(SHORTEST, chunks[-1])]
        augments = list(getattr(model, "augments", ()))
        self._count = len(augments)
        shapes = dict(enumerate(map(item_shape, augments)))
        self.shapes = {k: shape for k, shape in shapes.items() if shape is not None}
        self._alignments: dict[int, Alignment] = {}
        if True in getattr(model, "own_tokens", ()):
            self._alignments = alignments_of(model)
        self.follow = [k for k in self._alignments if not model.configs[k].encoder_only]
        self.slots = {k: shape[0] for k, shape in self.shapes.items()}
        for number, alignment in self._alignments.items():
            needed = math.ceil(reads[-1] * alignment.tokens_per_token())
            self.slots[number] = -(-needed // LEAST) * LEAST

    def of(self, request: Request) -> dict[int, Reading]:
        """What each augment reads of a request's prompt, by its number.

        Raises `CalmError` for a character that a tokenizer cannot spell, and for more inputs than
        the devices have room for.
        """
        found: dict[int, Reading] = {
            number: Text(alignment, request.prompt, request.asked)
            for number, alignment in self._alignments.items()
        }
        for number, shape in self.shapes.items():
            found[number] = Items(shape, request.items.get(number, Placed()))
        for number, reading in found.items():
            self._room(number, len(reading.order))
        return found

    def level(self, rows: Sequence[Row], tokens: int) -> int:
        """The index of the numbers of slots to read for `tokens` tokens and all that rows hold."""
        held = {k: max(row.own[k].held for row in rows) for k in self.slots}
        levels = range(self._reads.index(bucket(self._reads, tokens)), len(self._reads))
        enough = (x for x in levels if all(self._read(k, x) >= held[k] for k in held))
        return next(enough, levels[-1])

    def reads(self, level: int) -> tuple:
        """The numbers of slots to read, as `steps.prefill` takes them."""
        own = self._by_number({k: self._read(k, level) for k in self.slots})
        return (self._reads[level], own) if own else (self._reads[level],)

    def keep(self, state: State, index: int, row: Row) -> State:
        """The state that keeps of the row with this index what `row` holds."""
        if not row.own:
            return state
        held = {number: np.int32(reading.held) for number, reading in row.own.items()}
        return steps.keep_own(state, np.int32(index), self._by_number(held))

    def read(
        self,
        static: steps.Static,
        weights: nnx.State,
        state: State,
        rows: Mapping[int, Row],
        ends: Sequence[int],
    ) -> State:
        """The state after augments have read what tokens before `ends` may see.

        Args:
            rows: rows with an answer, by their numbers.
            ends: for each of them, the index of the first token that need not see its inputs.
        """
        for number in self.slots:
            while waiting := [
                (index, row, start, stop)
                for (index, row), end in zip(rows.items(), ends, strict=True)
                for start, stop in [row.own[number].unread(end)]
                if start < stop
            ]:
                state = self._read_some(static, weights, state, number, waiting)
        return state

    def _read_some(self, static, weights, state, number, waiting) -> State:
        """Reads the next inputs of some rows: (index, row, first, last) of each that waits."""
        size = self._size(number, max(stop - start for _, _, start, stop in waiting))
        count = 1
        if len(waiting) > 1:
            count = min(self._rows, max(1, self._at_once // size))
        indices, rows, starts, stops = zip(*waiting[:count], strict=True)
        stops = [min(stop, start + size) for start, stop in zip(starts, stops, strict=True)]
        slots = self._room(number, max(stops))
        if slots != self.slots[number]:
            state = steps.grow_own(state, number, slots)
            self.slots[number] = slots
        chunk = own_chunk(
            [row.own[number] for row in rows],
            [row.answer.request.asked for row in rows],
            list(zip(starts, stops, strict=True)),
            indices,
            indices if count == self._rows else range(len(rows)),
            count=count,
            size=size,
            no_row=self._rows,
        )
        levels = range(len(self._reads))
        read = next(r for x in levels if (r := self._read(number, x)) >= max(stops))
        state = steps.read_own(static, weights, state, chunk, number=number, read=read)
        for row, stop in zip(rows, stops, strict=True):
            row.own[number].held = stop
        return state

    def _read(self, number: int, level: int) -> int:
        """How many slots of an augment are read at a level."""
        slots = self.slots[number]
        if number in self.shapes:
            return slots
        return -(-slots * self._reads[level] // self._reads[-1])

    def _size(self, number: int, most: int) -> int:
        """Positions of a chunk for up to `most`; only of items all of them need to fit."""
        return self._rounded(number, most) if number in self.shapes else bucket(self._chunks, most)

    def _room(self, number: int, count: int) -> int:
        """The number of slots for `count` inputs; raises `CalmError` if they do not fit."""
        if count <= self.slots[number]:
            return self.slots[number]
        slots = self._rounded(number, count)
        check_grows(self._model, self._rows, self._dtype, number, slots)
        return slots

    def _rounded(self, number: int, count: int) -> int:
        unit = self.shapes[number][0] if number in self.shapes else LEAST
        return unit * bucket(buckets(1 << 30, 1), -(-count // unit))

    def _by_number(self, values: Mapping[int, Any]) -> tuple[Any, ...]:
        """Values for each augment of the model; () if none has inputs of its own."""
        return tuple(map(values.get, range(self._count))) if self.slots else ()
