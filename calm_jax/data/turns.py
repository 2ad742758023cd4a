"""The turns of a chat in an anchor's tokens, as an augment's own chat template writes them.

A *mark* is what a template writes before a message: the end of the turn before, and the header of
the next. Marks are found by rendering chats of known messages. Where the anchor's marks begin with
a special token, no message can be mistaken for one.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError

# Roles of messages; together they have every mark that is looked for.
_CHATS = (("user",), ("system", "user"), ("user", "assistant", "user"))
_CONTENTS = "\ue000\ue001\ue002"  # characters of private use, which no template writes

# What an anchor's ids stand for: a character, or a special token by its id.
Unit = str | int
Marks = Mapping[tuple[Unit, ...], str]


class Mark(NamedTuple):
    """What an augment reads before a message.

    Attributes:
        starts: whether the augment's start tokens, which every text has, are written before it.
    """

    text: str
    starts: bool = False


class Turns:
    """How two chat templates write the same turns.

    Attributes:
        begin: the anchor's marks of a first message, with the message's role.
        between: those of further messages.
        marks: the augment's, between two roles; the first is None before the first message.
    """

    def __init__(self, begin: Marks, between: Marks, marks: Mapping[tuple[str | None, str], Mark]):
        self.begin, self.between, self.marks = begin, between, marks

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
        begin, between, followed = {}, {}, set()
        for (before, role), texts in theirs.items():
            for text in texts if before else ():
                mark = tuple(units(anchor.encode_inside([text])[0], False))
                if mark and isinstance(mark[0], int):
                    between[mark] = role
                    followed.add(before)
        if not {"user", "assistant"} <= followed or not ours:
            return cls({}, {}, {})
        for (before, role), texts in theirs.items():
            if before is None and role in followed:
                # A system message that begins as a user's does cannot be told from it.
                begin.setdefault(tuple(units(anchor.encode_sequence(texts[0]), True)), role)
        start = "".join(augment.tokens()[token] for token in augment.start_ids)
        marks = {}
        for pair, (*_, text) in ours.items():
            starts = bool(start) and pair[0] is None and text.startswith(start)
            marks[pair] = Mark(text.removeprefix(start) if starts else text, starts)
        return cls(begin, between, marks)


class TurnReader:
    """Reads units one by one, and puts the augment's marks in the place of the anchor's."""

    def __init__(self, turns: Turns):
        self._turns, self._marks = turns, turns.begin
        self._begun = False
        self._written: str | None = None  # the last role that the augment has a mark of
        self._held: tuple[Unit, ...] = ()  # may be the beginning of a mark

    def read(self, unit: Unit) -> Iterable[Unit | Mark]:
        """What is certain after the next unit."""
        if not self._held and not any(mark[0] == unit for mark in self._marks):
            return (unit,) if self._begun else self._no_chat((unit,))
        self._held += (unit,)
        return self._settled(final=False)

    def close(self) -> Iterable[Unit | Mark]:
        """What is held, since a prompt ends here."""
        return self._settled(final=True)

    def _settled(self, final: bool) -> Iterable[Unit | Mark]:
        settled: list[Unit | Mark] = []
        while held := self._held:
            size = len(held)
            if not final and any(len(x) > size and x[:size] == held for x in self._marks):
                break
            whole = [mark for mark in self._marks if held[: len(mark)] == mark]
            if whole:
                longest = max(whole, key=len)
                role = self._marks[longest]
                if mark := self._turns.marks.get((self._written, role)):
                    settled.append(mark)
                    self._written = role
                self._held, self._begun = held[len(longest) :], True
                self._marks = self._turns.between
            elif self._begun:
                settled.append(held[0])
                self._held = held[1:]
            else:
                settled.extend(self._no_chat(held))
                self._held = ()
        return settled

    def _no_chat(self, units: Iterable[Unit]) -> Iterable[Unit]:
        self._marks, self._begun = {}, True
        return units


def _marks(vocabulary: Vocabulary) -> dict[tuple[str | None, str], list[str]]:
    """The marks of a vocabulary's template between two roles; none if it writes today's date.

    If the header of an answer to come is another than that of an answer, it is the first.
    """
    if vocabulary.chat_template is None:
        return {}
    found = [_rendered(vocabulary, strftime_now=lambda form, day=day: day) for day in ("1", "2")]
    return found[0] if found[0] == found[1] else {}


def _rendered(vocabulary: Vocabulary, **arguments: Any) -> dict[tuple[str | None, str], list[str]]:
    found: dict[tuple[str | None, str], list[str]] = {}
    for roles in _CHATS:
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, _CONTENTS, strict=False)
        ]
        try:
            text = vocabulary.chat(messages, **arguments)
        except CalmError:
            continue  # some templates refuse a system message
        parts = re.split(f"([{_CONTENTS}])", text)
        if parts[1::2] != list(_CONTENTS[: len(roles)]):
            continue
        after = [*roles, "assistant"]
        for pair, mark in zip(zip([None, *roles], after, strict=True), parts[::2], strict=True):
            if mark not in found.setdefault(pair, []):
                found[pair].append(mark)
    return found
