"""An answer as its tokens arrive, and when it is complete."""

from typing import Any, NamedTuple

from calm_jax.decoding.requests import News
from calm_jax.decoding.sampling import TokenLogprob
from calm_jax.decoding.text_stream import TextStream
from calm_jax.errors import CalmError


class Completion(NamedTuple):
    """One answer to a prompt.

    Attributes:
        tokens: ids, including the end token.
        text: the tokens as text, without the text that stopped them; "" without a vocabulary.
        finish_reason: "stop": an end token or a stop text; "length"; "error".
        logprobs: one for each token, if asked for.
        error: with "error", what went wrong.
    """

    tokens: list[int]
    text: str
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None


class WrittenAnswer:
    """An answer while it is generated."""

    def __init__(self, vocabulary: Any, prompt: list[int], stop: tuple[str, ...]):
        if stop and vocabulary is None:
            raise CalmError(f"stop is {stop}, but the model has no vocabulary")
        self._stream = None if vocabulary is None else TextStream(vocabulary, prompt, stop)
        self._looks = bool(stop)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.reason: str | None = None
        self.error: str | None = None
        self.must_end = False

    @property
    def ended(self) -> bool:
        return self.reason is not None

    def add(self, news: News) -> str:
        """Takes news; returns the text that is now certain."""
        if self.ended or news.sample < 0:
            return ""
        pieces = []
        # Token by token only if the token that completes a stop text must be found.
        parts = [[token] for token in news.tokens] if self._looks else [news.tokens]
        for part in parts:
            self.tokens += part
            if self._stream is not None:
                pieces.append(self._stream.push(part))
                if self._stream.stopped:
                    self.reason, self.must_end = "stop", news.finish_reason is None
                    break
        self.logprobs += news.logprobs
        del self.logprobs[len(self.tokens) :]
        if self.reason is None and news.finish_reason is not None:
            self.reason, self.error = news.finish_reason, news.error
            if self._stream is not None:
                pieces.append(self._stream.finish())
        return "".join(pieces)

    def completion(self, with_logprobs: bool) -> Completion:
        return Completion(
            self.tokens,
            "" if self._stream is None else self._stream.text,
            self.reason,
            self.logprobs if with_logprobs else None,
            self.error,
        )
