"""Choices of an answer as their tokens arrive: text, log-probabilities, and how they end."""

import dataclasses
import math
from typing import Any

from calm_jax.decoding import TokenLogprob
from calm_jax.decoding.requests import News
from calm_jax.decoding.text_stream import TextStream
from calm_jax.serving.protocol import Asked
from calm_jax.serving.token_texts import TokenTexts

_NEAR = 8  # most characters by which a normalised text may be away from its place
_NEVER = -9999.0  # OpenAI's log-probability for probability 0; JSON has no minus infinity


@dataclasses.dataclass
class Piece:
    """A token with its log-probability, and where it begins in the text of the choice."""

    token: int
    logprob: TokenLogprob | None
    offset: int


class Choice:
    """One choice of an answer.

    Attributes:
        index: its number in the answer.
        tokens: number of tokens, including the end token and those of a stop text.
        finish_reason: None until it has ended.
    """

    def __init__(self, asked: Asked, number: int, index: int):
        self.index = index
        self.tokens = 0
        self.finish_reason: str | None = None
        vocabulary, prompt = asked.model.vocabulary, asked.prompts[number]
        self._text = TextStream(vocabulary, prompt, asked.sampling.stop)
        self._wants_pieces = asked.sampling.logprobs is not None
        # Text that may begin a stop text is held back, but token positions must count it.
        self._all = TextStream(vocabulary, prompt) if self._wants_pieces else None
        self._by_token = self._wants_pieces or bool(asked.sampling.stop)
        self._start = len(asked.texts[number]) if asked.echo else 0
        self._waiting: list[Piece] = []

    def add(self, news: News) -> tuple[str, list[Piece]]:
        """The text that is now certain after news of the choice, and the tokens beginning in it."""
        text = ""
        # One by one, so that the result does not depend on how many tokens arrive at once.
        groups = [[token] for token in news.tokens] if self._by_token else [news.tokens]
        for place, group in enumerate(groups):
            if self._wants_pieces:
                offset = self._start + len(self._all.text)
                self._waiting.append(Piece(group[0], news.logprobs[place], offset))
                self._all.push(group)
            text += self._text.push(group)
            self.tokens += len(group)
            if self._text.stopped:
                self.finish_reason = "stop"
                return text, self._ready(stopped=True)
        if news.finish_reason is not None:
            text += self._text.finish()
            self.finish_reason = "stop" if self._text.stopped else news.finish_reason
        return text, self._ready(stopped=self._text.stopped)

    def _ready(self, *, stopped: bool) -> list[Piece]:
        end = self._start + len(self._text.text)
        whole = self.finish_reason is not None and not stopped
        ready = [piece for piece in self._waiting if whole or piece.offset < end]
        self._waiting = self._waiting[len(ready) :]
        return ready


def prompt_pieces(
    asked: Asked, number: int, scores: list[TokenLogprob], texts: TokenTexts
) -> list[Piece]:
    """The tokens of an echoed prompt; the first has no log-probability.

    Decoding omits special tokens, but the echoed text has those that are written in it.
    """
    vocabulary, text = asked.model.vocabulary, asked.texts[number]
    stream, pieces, end = TextStream(vocabulary, []), [], 0
    for token, score in zip(asked.prompts[number], [None, *scores], strict=True):
        pieces.append(Piece(token, score, end))
        if texts.raw(token) is None:
            is_put = len(pieces) <= len(vocabulary.start_ids)  # before the text, not written in it
            end = _end_of_special(text, texts.text(token), end, may_be_apart=not is_put)
        if token not in vocabulary.eos_ids:
            before = len(stream.text)
            stream.push([token])
            end = _end_of(text, stream.text[before:], end)
    return pieces


def _end_of_special(text: str, name: str, start: int, *, may_be_apart: bool) -> int:
    """Where a special token at `start` of a text ends; `start` if it is not written there.

    It may be apart: some special tokens include the white space before them.
    """
    if may_be_apart and not text.startswith(name, start):
        apart = len(text) - len(text[start:].lstrip())
        start = apart if text.startswith(name, apart) else start
    return start + len(name) if text.startswith(name, start) else start


def _end_of(text: str, piece: str, start: int) -> int:
    """Where the next piece of a text ends; a tokenizer may have added a space, or normalised it."""
    if text.startswith(piece, start):
        return start + len(piece)
    core = piece.strip()
    if not core:
        return start
    found = text.find(core, start, start + len(core) + _NEAR)
    return min(start + len(piece), len(text)) if found < 0 else found + len(core)


def legacy_logprobs(texts: TokenTexts, pieces: list[Piece], top: int) -> dict[str, Any]:
    """The object of /v1/completions; each dict has the token itself besides the `top` others."""
    tokens, logprobs, tops = [], [], []
    for piece in pieces:
        if piece.logprob is None:
            tokens.append(texts.text(piece.token))
            logprobs.append(None)
            tops.append(None)
            continue
        value = piece.logprob.logprob
        values = dict(piece.logprob.top[:top])
        values.setdefault(piece.token, value)
        names = texts.unambiguous(list(values))
        tokens.append(names[list(values).index(piece.token)])
        logprobs.append(_finite(values[piece.token]))
        tops.append(dict(zip(names, map(_finite, values.values()), strict=True)))
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops if top else None,
        "text_offset": [piece.offset for piece in pieces],
    }


def chat_logprobs(texts: TokenTexts, pieces: list[Piece], top: int) -> dict[str, Any]:
    """The object of /v1/chat/completions."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = texts.raw(token)
        return {"token": texts.text(token), "logprob": _finite(logprob), "bytes": raw}

    content = [
        {
            **entry(piece.token, piece.logprob.logprob),
            "top_logprobs": [entry(*pair) for pair in piece.logprob.top[:top]],
        }
        for piece in pieces
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    return max(logprob, _NEVER) if math.isfinite(logprob) else _NEVER
