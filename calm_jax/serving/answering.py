"""Answers in OpenAI's form, whole or as server-sent events."""

import asyncio
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from calm_jax.serving.choices import Choice, Piece, chat_logprobs, legacy_logprobs, prompt_pieces
from calm_jax.serving.engine_thread import Flight
from calm_jax.serving.errors import Refused
from calm_jax.serving.metrics import Metrics
from calm_jax.serving.protocol import Asked
from calm_jax.serving.token_texts import TokenTexts


@dataclasses.dataclass
class Part:
    """What has arrived of a choice."""

    choice: Choice
    text: str
    pieces: list[Piece]
    is_first: bool


class Answer:
    """The answer to one HTTP request.

    Args:
        start: `time.perf_counter()` at its beginning.
    """

    def __init__(
        self, asked: Asked, flight: Flight, texts: TokenTexts, metrics: Metrics, start: float
    ):
        self._asked, self._flight, self._texts = asked, flight, texts
        self._metrics, self._start = metrics, start
        self._choices = [
            Choice(asked, index // asked.sampling.n, index) for index in range(asked.answers)
        ]
        kind = "chatcmpl" if asked.is_chat else "cmpl"
        self._head = {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "object": "chat.completion" if asked.is_chat else "text_completion",
            "created": int(time.time()),
            "model": asked.model.name,
        }

    async def submit(self) -> None:
        """Hands the prompts to the engine; raises `Refused`."""
        asked = self._asked
        await self._flight.submit(asked.prompts, asked.sampling, asked.score_from)
        count = sum(map(len, asked.prompts))
        self._metrics.prompt_tokens.labels(asked.model.name).inc(count)

    async def whole(self) -> dict[str, Any]:
        """The answer when all choices have ended."""
        texts = [""] * len(self._choices)
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        async for part in self._parts():
            texts[part.choice.index] += part.text
            pieces[part.choice.index] += part.pieces
        choices = [
            self._choice(choice, texts[choice.index], pieces[choice.index])
            for choice in self._choices
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events; an error ends them."""
        usage = {"usage": None} if self._asked.include_usage else {}
        head = dict(self._head)
        if self._asked.is_chat:
            head["object"] = "chat.completion.chunk"
        async for part in self._parts():
            yield event({**head, "choices": [self._chunk(part)], **usage})
        if usage:
            yield event({**head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    async def _parts(self) -> AsyncIterator[Part]:
        asked, left = self._asked, len(self._choices)
        n = asked.sampling.n
        begun, scored, early = set(), set(), []
        while left:
            number, news = await self._flight.next()
            if news.finish_reason == "error":
                raise Refused(500, f"the model failed: {news.error}", code="model_failed")
            if not begun:
                seconds = time.perf_counter() - self._start
                self._metrics.first_token.labels(asked.model.name).observe(seconds)
            if news.sample == -1:
                scored.add(number)
                pieces = await asyncio.to_thread(
                    prompt_pieces, asked, number, news.logprobs, self._texts
                )
                of_prompt = self._choices[number * n :][:n]
                for choice in of_prompt:
                    if asked.scores_only:
                        choice.finish_reason, left = "length", left - 1
                    begun.add(choice)
                    yield Part(choice, asked.texts[number], pieces, True)
                ready = [(n, x) for n, x in early if n == number]
                early = [(n, x) for n, x in early if n != number]
            elif asked.score_from is not None and number not in scored:
                early.append((number, news))
                continue
            else:
                ready = [(number, news)]
            for number, news in ready:
                choice = self._choices[number * n + news.sample]
                if choice.finish_reason is not None:
                    continue  # a stop text has ended the choice; these tokens came too late
                before = choice.tokens
                text, pieces = choice.add(news)
                made = choice.tokens - before
                self._metrics.generated_tokens.labels(asked.model.name).inc(made)
                if choice.finish_reason is not None:
                    left -= 1
                    if news.finish_reason is None:
                        self._flight.end_sample(number, news.sample)
                is_first = choice not in begun
                if is_first and asked.echo:
                    text = asked.texts[number] + text
                begun.add(choice)
                if text or pieces or is_first or choice.finish_reason is not None:
                    yield Part(choice, text, pieces, is_first)

    def _choice(self, choice: Choice, text: str, pieces: list[Piece]) -> dict[str, Any]:
        said = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self._asked.is_chat
            else {"text": text}
        )
        return self._with_logprobs(choice, said, pieces)

    def _chunk(self, part: Part) -> dict[str, Any]:
        said = {"text": part.text}
        if self._asked.is_chat:
            first = {"role": "assistant"} if part.is_first else {}
            content = {"content": part.text} if part.text or first else {}
            said = {"delta": {**first, **content}}
        return self._with_logprobs(part.choice, said, part.pieces)

    def _with_logprobs(
        self, choice: Choice, said: dict[str, Any], pieces: list[Piece]
    ) -> dict[str, Any]:
        logprobs, top = None, self._asked.sampling.logprobs
        if top is not None:
            listed = chat_logprobs if self._asked.is_chat else legacy_logprobs
            logprobs = listed(self._texts, pieces, top)
        rest = {"logprobs": logprobs, "finish_reason": choice.finish_reason}
        return {"index": choice.index, **said, **rest}

    def _usage(self) -> dict[str, int]:
        prompt = sum(map(len, self._asked.prompts))
        answer = sum(choice.tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
        }


def event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n".encode()
