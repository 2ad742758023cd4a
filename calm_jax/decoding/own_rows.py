"""What augments with inputs of their own read of each row: other tokens of its text, or items.

Axes: P row of a chunk, S position of an augment's inputs, F features.
"""

import bisect
import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from calm_jax.data.alignment import Alignment, Reader
from calm_jax.data.own_features import Placed
from calm_jax.decoding.requests import common
from calm_jax.decoding.state import OwnChunk


class Text:
    """An augment's own tokens of the text of a row, which may go on.

    Attributes:
        ids: token ids.
        order: for each, the index of the first token of the anchor that may see it; ascending.
        held: number of them in the row's cache.
    """

    def __init__(self, alignment: Alignment, prompt: Sequence[int], asked: int):
        self._alignment, self._reader, self.held = alignment, Reader(alignment), 0
        self.ids = list(alignment.augment.start_ids)
        self.order = [0] * len(self.ids)
        pieces = self._reader.read_all(prompt, asked)
        alignment.check([prompt], [pieces])
        self._take(pieces)

    def add(self, token: int) -> None:
        """Reads the anchor's next token."""
        self._take(self._reader.read(token))

    def _take(self, pieces: Sequence[Any]) -> None:
        for piece, ids in zip(pieces, self._alignment.encode(pieces), strict=True):
            self.ids.extend(ids)
            self.order.extend([piece.order] * len(ids))

    def copy(self, held: int) -> "Text":
        """A copy for a row that holds the first `held` tokens."""
        new = copy.copy(self)
        new.ids, new.order, new.held = list(self.ids), list(self.order), held
        new._reader = self._reader.copy()
        return new

    def same(self, other: "Text") -> int:
        """How many of the first tokens are those of `other`, seen from the same tokens on."""
        most = min(len(self.ids), len(other.ids))
        return min(common(self.ids, other.ids, most), common(self.order, other.order, most))

    def kept(self, index: int) -> int:
        """How many of the first tokens a row keeps with the anchor's tokens before `index`."""
        return bisect.bisect_left(self.order, index)

    def unread(self, index: int) -> tuple[int, int]:
        """First and last (excluded) of what the anchor's tokens before `index` need to be held."""
        return self.held, bisect.bisect_left(self.order, index)


class Items:
    """The items of a row, of an augment that reads features, with the methods of `Text`.

    Attributes:
        features_SF: float32 [S, F], one item after another.
        order: for each position, the index of the item's place.
        held: as of `Text`; all are read at once, or none.
    """

    def __init__(self, shape: tuple[int, int], placed: Placed):
        items = [np.asarray(item, np.float32) for item in placed.items]
        self.features_SF = np.concatenate(items) if items else np.zeros((0, shape[1]), np.float32)
        self.order = np.repeat(np.array(placed.order, np.int32), shape[0]).tolist()
        self.held = 0

    def copy(self, held: int) -> "Items":
        new = copy.copy(self)
        new.held = held
        return new

    def same(self, other: "Items") -> int:
        most = min(len(self.order), len(other.order))
        equal = np.equal(self.order[:most], other.order[:most])
        equal &= np.all(self.features_SF[:most] == other.features_SF[:most], axis=1)
        return most if np.all(equal) else int(np.argmin(equal))

    def kept(self, index: int) -> int:
        """All positions if the anchor's tokens before `index` have all items; else none."""
        return len(self.order) if max(self.order, default=0) < index else 0

    def unread(self, index: int) -> tuple[int, int]:
        return self.held, len(self.order)


Reading = Text | Items


def own_chunk(
    readings: Sequence[Reading],
    asked: Sequence[int],
    spans: Sequence[tuple[int, int]],
    rows: Sequence[int],
    places: Sequence[int],
    *,
    count: int,
    size: int,
    no_row: int,
) -> OwnChunk:
    """Inputs of one augment's own of some rows, in NumPy arrays.

    Args:
        asked: for each row the number of the anchor's tokens that are a prompt.
        spans: for each row the first and last (excluded) of its inputs.
        rows: the number of each row.
        places: the place of each row in the chunk.
        count: P, number of places; those without a row get the row `no_row`.
        size: S.
    """
    order_PS = np.zeros((count, size), np.int32)
    length_P, prompt_P = np.zeros((2, count), np.int32)
    rows_P = np.full(count, no_row, np.int32)
    rows_P[list(places)] = rows
    tokens_PS = features_PSF = None
    if isinstance(readings[0], Text):
        tokens_PS = np.zeros((count, size), np.int32)
    else:
        features_PSF = np.zeros((count, size, readings[0].features_SF.shape[1]), np.float32)
    for place, reading, of_row, (start, stop) in zip(places, readings, asked, spans, strict=True):
        order_PS[place, : stop - start] = reading.order[start:stop]
        length_P[place], prompt_P[place] = stop - start, of_row
        if tokens_PS is not None:
            tokens_PS[place, : stop - start] = reading.ids[start:stop]
        else:
            features_PSF[place, : stop - start] = reading.features_SF[start:stop]
    return OwnChunk(tokens_PS, features_PSF, order_PS, length_P, rows_P, prompt_P)
