"""How an augment with a tokenizer of its own reads the text of an anchor's tokens.

The text is what the anchor's ids stand for. It is cut into *pieces*; the augment's tokenizer
encodes each by itself. Whether there is a cut between two characters depends only on them and on
the characters before them, so a piece is closed, for good, by the first character after it. Its
tokens may be read from the anchor's token on that completes that character: no later character
changes them. docs/tokenizers.md has the rules and their reasons.
"""

import codecs
import copy
import functools
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from calm_jax.data.turns import Mark, TurnReader, Turns, Unit
from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError

# Of the rule by which tokens are aligned: rows that were made by another are made anew.
VERSION = 2

# Most characters of a piece, unless one token of the augment has more.
LONGEST_PIECE = 32

# Encoded pieces that are kept, since words come again.
MOST_KEPT = 100_000

# Tokens of the anchor by which the length of the augment's texts is estimated.
MEASURED = 2_000

# Pairs of kinds of characters (see `_kind`) between which tokenizers split a text.
_CUTS = {
    *((kind, "space") for kind in ("letter", "number", "mark", "other")),
    *((kind, "white") for kind in ("letter", "number", "mark", "other")),
    *((kind, "line") for kind in ("letter", "number")),
    *((kind, "other") for kind in ("letter", "number")),
    *((kind, "number") for kind in ("letter", "mark", "other")),
    ("number", "letter"),
}


class Aligned(NamedTuple):
    """An augment's tokens, in the order of the text.

    `order` is for each the index of the first token of the anchor that may read it; ascending.
    """

    ids: list[int]
    order: list[int]


class Piece(NamedTuple):
    """A closed piece of a text; `order` is the index of the anchor's token that closes it."""

    text: str
    order: int
    begins_text: bool


class Alignment:
    """The augment's tokens for an anchor's tokens; `name` is the augment's in errors.

    Raises `CalmError` if the text of the anchor's tokens depends on their neighbours.

    >>> from calm_jax.data.vocabularies import load_vocabulary
    >>> anchor, augment = load_vocabulary("key_value"), load_vocabulary("bytes")
    >>> alignment = Alignment(anchor, augment)
    >>> alignment.align([anchor.encode("<math>12")], [None])[0].order
    [0, 0, 0, 0, 0, 0, 1, 1]
    """

    def __init__(self, anchor: Vocabulary, augment: Vocabulary, name: str = "the augment"):
        self.anchor, self.augment, self.name = anchor, augment, name
        self.shared = anchor.fingerprint == augment.fingerprint
        if not self.shared:
            self.bytes_of_ids = anchor.token_bytes()
            self.cuts = _Cuts(augment)
            self.turns = Turns.of(anchor, augment, self._units_of)
            self._encoded: dict[tuple[str, bool], list[int]] = {}

    def align(
        self,
        ids: Sequence[Sequence[int]],
        prompts: Sequence[int | None],
        *,
        check: bool = False,
    ) -> list[Aligned]:
        """The augment's tokens for each sequence of the anchor's ids.

        Tokens that the sequence leaves open are left out: no token of the anchor may read them.

        Args:
            ids: the anchor's, with start tokens.
            prompts: for each sequence the number of ids of its prompt, whose last one closes all
                text before it; None: there is no prompt.
            check: whether to raise `CalmError` for a character that either tokenizer cannot spell.
        """
        if self.shared:
            return [Aligned(list(row), list(range(len(row)))) for row in ids]
        pieces = [
            Reader(self).read_all(row, prompt) for row, prompt in zip(ids, prompts, strict=True)
        ]
        if check:
            self.check(ids, pieces)
        encoded = iter(self.encode([piece for row in pieces for piece in row]))
        found = []
        for row, of_row in zip(pieces, ids, strict=True):
            start = self.augment.start_ids if of_row else ()
            aligned = Aligned(list(start), [0] * len(start))
            for piece in row:
                piece_ids = next(encoded)
                aligned.ids.extend(piece_ids)
                aligned.order.extend([piece.order] * len(piece_ids))
            found.append(aligned)
        return found

    def encode(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """The augment's ids of each piece."""
        asked = [(piece.text, piece.begins_text) for piece in pieces]
        encoders = {True: self.augment.encode_batch, False: self.augment.encode_inside}
        for begins, encode in encoders.items():
            new = [key for key in dict.fromkeys(asked) if key[1] == begins]
            new = [key for key in new if key not in self._encoded]
            self._encoded.update(zip(new, encode([text for text, _ in new]), strict=True))
        found = [self._encoded[key] for key in asked]
        if len(self._encoded) > MOST_KEPT:
            self._encoded.clear()
        return found

    def tokens_per_token(self) -> float:
        """About how many tokens the augment needs for one of the anchor's, at least 1.

        Of tokens from all of the anchor's vocabulary, which are longer than those of a text.
        """
        sample = self.bytes_of_ids[:: -(-len(self.bytes_of_ids) // MEASURED)]
        texts = [text.decode(errors="ignore") for text in sample]
        return max(1.0, sum(map(len, self.augment.encode_inside(texts))) / len(texts))

    def _units_of(self, ids: Sequence[int], begins: bool) -> list[Unit]:
        units = Units(self, begins)
        return [unit for token in ids for unit in units.read(token)]

    def check(self, ids: Sequence[Sequence[int]], pieces: Sequence[Sequence[Piece]]) -> None:
        """Raises `CalmError` for a character that either tokenizer cannot spell.

        `pieces` are those of each sequence of the anchor's `ids`.
        """
        for row in ids:
            if self.anchor.unknown_id is not None and self.anchor.unknown_id in row:
                index = list(row).index(self.anchor.unknown_id)
                before = self.anchor.decode(row[max(index - 8, 0) : index])
                after = self.anchor.decode(row[index + 1 : index + 9])
                raise CalmError(
                    f"between {before!r} and {after!r} stands the anchor's token for text that its "
                    f"tokenizer cannot spell, so {self.name} could not read it; remove that text"
                )
        for text in dict.fromkeys(piece.text for row in pieces for piece in row):
            lost = self.augment.lost_character(text)
            if lost is not None:
                raise CalmError(
                    f"{self.name}'s tokenizer has no token for {lost!r} in {text!r}; remove that "
                    "text, or take an augment whose tokenizer spells any text by its bytes"
                )


class Units:
    """Reads an anchor's ids one by one, and gives the characters and special tokens they end.

    `begins` says whether the ids begin a text.
    """

    def __init__(self, alignment: Alignment, begins: bool = True):
        self._bytes_of_ids = alignment.bytes_of_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips = begins and alignment.anchor.space_before_text

    def copy(self) -> "Units":
        new = copy.copy(self)
        new._decoder = copy.copy(self._decoder)
        return new

    def read(self, token: int) -> list[Unit]:
        given = self._bytes_of_ids[token] if 0 <= token < len(self._bytes_of_ids) else b""
        # At a special token the text ends, within a character or not.
        text = self._decoder.decode(given, final=not given)
        if self._strips and text:
            text, self._strips = text.removeprefix(" "), False
        return list(text) if given else [*text, token]


class Reader:
    """Reads an anchor's ids one by one, and gives the pieces of text that they close."""

    def __init__(self, alignment: Alignment):
        self._cuts, self._units = alignment.cuts, Units(alignment)
        self._turns = TurnReader(alignment.turns)
        self._open, self._begins, self._index = "", True, 0
        self._led = False  # whether what is open is the space at the end of a mark

    def copy(self) -> "Reader":
        """A reader that goes on from here by itself."""
        new = copy.copy(self)
        new._units, new._turns = self._units.copy(), self._turns.copy()
        return new

    def read_all(self, ids: Sequence[int], prompt: int | None) -> list[Piece]:
        """The pieces that the next ids close; `prompt` is the number of ids of the prompt."""
        return [piece for token in ids for piece in self.read(token, self._index + 1 == prompt)]

    def read(self, token: int, closes: bool = False) -> list[Piece]:
        """The pieces that the next id closes.

        Args:
            closes: whether the id is the last of a prompt. That closes the text before it, except
                the bytes of a character that is not whole yet.
        """
        pieces: list[Piece] = []
        units = self._units.read(token)
        for settled in self._turns.read(units, closes):
            self._take(settled, pieces)
        # A special token closes the text before it, whether or not a mark begins with it.
        if (closes or (units and isinstance(units[-1], int))) and not self._led:
            self._close(pieces)
        self._index += 1
        return pieces

    def _take(self, unit: Unit | Mark, pieces: list[Piece]) -> None:
        """Reads a character, or what closes a piece: a special token or the augment's mark."""
        if isinstance(unit, str):
            if self._open and self._cuts.between(self._open, unit):
                self._close(pieces)
            self._open, self._led = self._open + unit, False
            if self._cuts.everywhere:
                self._close(pieces)
            return
        self._close(pieces)
        if isinstance(unit, Mark):
            self._begins = self._begins and not unit.starts
            # A space at its end belongs to the first word of the message.
            self._open = unit.text.rstrip(" ")
            self._close(pieces)
            self._open = unit.text[len(unit.text.rstrip(" ")) :]
            self._led = bool(self._open)

    def _close(self, pieces: list[Piece]) -> None:
        if self._open:
            pieces.append(Piece(self._open, self._index, self._begins))
            self._open, self._begins, self._led = "", False, False


class _Cuts:
    """Where texts are cut for an augment's tokenizer; `everywhere`: after every character."""

    def __init__(self, augment: Vocabulary):
        self.everywhere = augment.by_character
        self._whole = frozenset(augment.whole_texts)
        self._beginnings = frozenset(
            text[:end] for text in self._whole for end in range(2, len(text) + 1)
        )
        self._ends = frozenset(text[-1] for text in self._whole)
        self._longest = max(map(len, self._whole), default=0)

    def between(self, text: str, character: str) -> bool:
        """Whether there is a cut between an open piece `text` and the character after it."""
        cut = (
            (_kind(text[-1]), _kind(character)) in _CUTS
            or (len(text) >= LONGEST_PIECE and _kind(character) != "mark")
            or (text[-1] in self._ends and self._ends_in(text, self._whole))
        )
        return cut and not self._ends_in(text + character, self._beginnings)

    def _ends_in(self, text: str, ends: frozenset[str]) -> bool:
        sizes = range(2, min(len(text), self._longest) + 1)
        return any(text[-size:] in ends for size in sizes)


@functools.cache
def _kind(character: str) -> str:
    """Letter, number, mark (it belongs to the character before it), white space, or other."""
    if character == " ":
        return "space"
    if character in "\r\n":
        return "line"
    if character.isspace():
        return "white"
    category = unicodedata.category(character)
    if category[0] in "LN":
        return "letter" if category[0] == "L" else "number"
    is_skin_tone = "\N{EMOJI MODIFIER FITZPATRICK TYPE-1-2}" <= character <= "\U0001f3ff"
    return "mark" if category[0] == "M" or category == "Cf" or is_skin_tone else "other"
