"""The turns of a chat in an anchor's tokens, as an augment's own chat template writes them.

A *mark* is what a template writes before a message: the end of the turn before, and the header of
the next. Marks are found by rendering chats of known messages. Only marks of the anchor that begin
with a special token count, since no message can be mistaken for those.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError

# Roles of the messages of chats that are rendered. Templates refuse some of these.
_CHATS = (
    ("user",),
    ("system", "user"),
    ("user", "user"),
    ("user", "assistant", "user"),
    ("user", "assistant", "system", "user"),
)
_CONTENTS = "\ue000\ue001\ue002\ue003"  # characters of private use, which no template writes

# What an anchor's ids stand for: a character, or a special token by its id.
Unit = str | int
# Between a role, None before the first message, and the next role.
Pair = tuple[str | None, str]


class Mark(NamedTuple):
    """What an augment reads before a message.

    `starts` says whether the augment's start tokens, which every text has, are written before it.
    """

    text: str
    starts: bool = False


class Marks:
    """An anchor's marks.

    Attributes:
        roles: by mark, the role of the message that it begins.
        firsts: the first unit of each mark.
    """

    def __init__(self, roles: Mapping[tuple[Unit, ...], str]):
        self.roles, self.firsts = dict(roles), frozenset(mark[0] for mark in roles)


class Turns:
    """How two chat templates write the same turns.

    Attributes:
        begin: the anchor's marks of a first message.
        between: those of further messages.
    """

    def __init__(self, begin: Marks, between: Marks, marks: Mapping[Pair, Mark]):
        self.begin, self.between, self._marks = begin, between, marks

    @classmethod
    def of(
        cls,
        anchor: Vocabulary,
        augment: Vocabulary,
        units: Callable[[Sequence[int], bool], Iterable[Unit]],
    ) -> "Turns":
        """The turns of two vocabularies; without marks if the augment reads the anchor's text.

        That is so if one of them has no template, or one that writes today's date; or if messages
        could be mistaken for the anchor's marks.

        Args:
            units: gives the units of the anchor's ids, and takes whether they begin a text.
        """
        theirs, ours = _marks(anchor), _marks(augment)
        between: dict[tuple[Unit, ...], str] = {}
        followed = set()
        for (before, role), texts in theirs.items():
            for text in texts if before else ():
                mark = tuple(units(anchor.encode_inside([text])[0], False))
                if mark and isinstance(mark[0], int):
                    between[mark] = role
                    followed.add(before)
        if not {"user", "assistant"} <= followed or not ours:
            return cls(Marks({}), Marks({}), {})
        starts = tuple(units(anchor.start_ids, True))
        begin: dict[tuple[Unit, ...], str] = {}
        for (before, role), texts in theirs.items():
            if before is not None or role not in followed:
                continue
            mark = tuple(units(anchor.encode_sequence(texts[0]), True))
            # Start tokens alone begin every text. A system message that begins as a user's does
            # cannot be told from it.
            if len(mark) > len(starts):
                begin.setdefault(mark, role)
        return cls(Marks(begin), Marks(between), _written_by(augment, ours))

    def mark(self, before: str | None, role: str) -> Mark | None:
        """The augment's mark between two roles; None if its template cannot write the role."""
        if (before, role) in self._marks:
            return self._marks[before, role]
        # Roles that its template never writes one after the other: as after another role.
        others = (mark for (other, name), mark in self._marks.items() if name == role and other)
        return next(others, None)


class TurnReader:
    """Reads units, and puts the augment's marks in the place of the anchor's."""

    def __init__(self, turns: Turns):
        self._turns, self._marks = turns, turns.begin
        self._written: str | None = None  # the last role that the augment has a mark of
        self._held: list[Unit] = []  # the beginning of the marks in `_open`
        self._open: list[tuple[Unit, ...]] = []

    def copy(self) -> "TurnReader":
        new = TurnReader(self._turns)
        new._marks, new._written = self._marks, self._written
        new._held, new._open = list(self._held), self._open
        return new

    def read(self, units: list[Unit], closes: bool = False) -> Sequence[Unit | Mark]:
        """What is certain after the next units; all of it if they `close` a prompt."""
        settled: list[Unit | Mark] = []
        if units and not self._held and self._marks.firsts.isdisjoint(units):
            self._marks = self._turns.between
            return units
        self._read(units, settled)
        while closes and self._held:
            self._read(self._settle(settled), settled)
        return settled

    def _read(self, units: list[Unit], settled: list[Unit | Mark]) -> None:
        waiting = units[::-1]
        while waiting:
            unit, size = waiting.pop(), len(self._held)
            if not size and unit not in self._marks.firsts:
                settled.append(unit)
                self._marks = self._turns.between
                continue
            known = self._open if size else self._marks.roles
            self._open = [mark for mark in known if len(mark) > size and mark[size] == unit]
            self._held.append(unit)
            if not any(len(mark) > size + 1 for mark in self._open):
                waiting.extend(self._settle(settled)[::-1])

    def _settle(self, settled: list[Unit | Mark]) -> list[Unit]:
        """Settles the beginning of what is held, a mark or a unit; returns the rest."""
        held = tuple(self._held)
        self._held, self._open = [], []
        whole = [mark for mark in self._marks.roles if held[: len(mark)] == mark]
        longest = max(whole, key=len, default=held[:1])
        role = self._marks.roles.get(longest)
        self._marks = self._turns.between
        mark = None if role is None else self._turns.mark(self._written, role)
        if mark is not None:
            settled.append(mark)
            self._written = role
        elif role is None:
            settled.extend(longest)
        return list(held[len(longest) :])


def _written_by(augment: Vocabulary, marks: Mapping[Pair, Sequence[str]]) -> dict[Pair, Mark]:
    start = "".join(augment.tokens()[token] for token in augment.start_ids)
    found = {}
    for pair, texts in marks.items():
        # An answer is read as one that was given, without what only invites it.
        text = texts[-1]
        starts = bool(start) and pair[0] is None and text.startswith(start)
        found[pair] = Mark(text.removeprefix(start) if starts else text, starts)
    return found


def _marks(vocabulary: Vocabulary) -> dict[Pair, list[str]]:
    """The marks of a vocabulary's template; none if it writes today's date.

    The header that invites an answer may differ from that of an answer in a chat; then it is the
    first of two.
    """
    if vocabulary.chat_template is None:
        return {}
    found = [_rendered(vocabulary, day) for day in ("1", "2")]
    return found[0] if found[0] == found[1] else {}


def _rendered(vocabulary: Vocabulary, day: str) -> dict[Pair, list[str]]:
    found: dict[Pair, list[str]] = {}
    for roles in _CHATS:
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, _CONTENTS, strict=False)
        ]
        try:
            text = vocabulary.chat(messages, strftime_now=lambda form: day)
        except CalmError:
            continue
        parts = re.split(f"([{_CONTENTS}])", text)
        if parts[1::2] != list(_CONTENTS[: len(roles)]):
            continue
        after = [*roles, "assistant"]
        for pair, mark in zip(zip([None, *roles], after, strict=True), parts[::2], strict=True):
            if mark not in found.setdefault(pair, []):
                found[pair].append(mark)
    return found
