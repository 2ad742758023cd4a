"""The text of an answer as its tokens arrive."""

from collections.abc import Sequence
from typing import Any

# How a token is written depends only on the few before it; a character has only a few tokens.
CONTEXT = 16

HALF = "\N{REPLACEMENT CHARACTER}"  # the decoded bytes of half a character


class TextStream:
    """Turns tokens into text: never half a character, and no part of a stop text.

    Args:
        vocabulary: a `calm_jax.data.vocabulary.Vocabulary`.
        prompt_ids: the ids that the answer continues.
        stop: texts before which the answer ends; special tokens in them are found too, though the
            text of an answer omits these.

    Attributes:
        text: all text so far.
        stopped: whether one of `stop` has been reached.
    """

    def __init__(self, vocabulary: Any, prompt_ids: Sequence[int], stop: Sequence[str] = ()):
        self._vocabulary = vocabulary
        marks = _marks(vocabulary, stop)
        self._marks = {vocabulary.token_id(text): mark for text, mark in marks.items()}
        marked = stop
        for text, mark in marks.items():
            marked = [one.replace(text, mark) for one in marked]
        self._stop = tuple(dict.fromkeys([*stop, *marked]))
        # All but the last tokens are final text, so that long answers are not decoded again.
        self._before, self._tokens = list(prompt_ids)[-CONTEXT:], []
        self._settled = ""
        self.text = ""
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is now certain."""
        if self.stopped:
            return ""
        for token in tokens:
            self._tokens.append(token)
            if token in self._marks:
                self._settle(self._decoded() + self._marks[token])
        return self._given(self._decoded().rstrip(HALF), may_go_on=True)

    def finish(self) -> str:
        """The rest of the text."""
        return "" if self.stopped else self._given(self._decoded(), may_go_on=False)

    def _decoded(self) -> str:
        whole = self._settled + self._vocabulary.decode_after(self._before, self._tokens)
        if len(self._tokens) >= 2 * CONTEXT and not whole.endswith(HALF):
            self._settle(whole)
        return whole

    def _settle(self, whole: str) -> None:
        self._settled, self._before = whole, [*self._before, *self._tokens][-CONTEXT:]
        self._tokens = []

    def _given(self, whole: str, *, may_go_on: bool) -> str:
        ends = [whole.find(text) for text in self._stop if text in whole]
        if ends:
            self.stopped, whole = True, whole[: min(ends)]
        elif may_go_on:
            whole = whole[: len(whole) - self._begun(whole)]
        for mark in self._marks.values():
            whole = whole.replace(mark, "")
        new, self.text = whole[len(self.text) :], max(whole, self.text, key=len)
        return new

    def _begun(self, whole: str) -> int:
        """The number of last characters that may begin a stop text."""
        begun = (
            length
            for text in self._stop
            for length in range(min(len(text) - 1, len(whole)), 0, -1)
            if whole.endswith(text[:length])
        )
        return max(begun, default=0)


def _marks(vocabulary: Any, stop: Sequence[str]) -> dict[str, str]:
    """The special tokens that are written in `stop`, the longest first, each with a character that
    no decoded text has: half of a surrogate pair."""
    if not stop:
        return {}
    before = vocabulary.encode("a")
    written = [text for text in vocabulary.whole_texts if any(text in one for one in stop)]
    ids = {text: vocabulary.token_id(text) for text in sorted(written, key=len, reverse=True)}
    special = [
        text
        for text, token in ids.items()
        if token is not None and not vocabulary.decode_after(before, [token])
    ]
    return {text: chr(0xD800 + number) for number, text in enumerate(special)}
