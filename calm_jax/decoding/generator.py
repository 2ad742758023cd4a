"""A model's answers: complete, streamed, or only scored."""

import collections
import contextlib
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from calm_jax.data.own_features import Placed
from calm_jax.decoding.completion import Completion, WrittenAnswer
from calm_jax.decoding.draft_length import Drafting
from calm_jax.decoding.requests import News, Request, by_beginning, in_common
from calm_jax.decoding.sampling import Sampling, TokenLogprob
from calm_jax.decoding.scheduler import MOST_STEPS, Scheduler
from calm_jax.errors import CalmError
from calm_jax.models import ComposedDecoder, Decoder

STREAMED_STEPS = 4  # tokens that are made before their text is shown
MOST_ROWS = 64  # most rows that `generate` decodes at once

Prompt = str | Sequence[int]


class Score(NamedTuple):
    """The log-probability (natural) of a continuation, in total and for each token.

    `is_greedy`: whether each of its tokens is the most probable one.
    """

    logprob: float
    tokens_logprobs: list[float]
    is_greedy: bool


class Generator:
    """Answers prompts with one model, whose caches it keeps between calls.

    Args:
        model: a decoder or a composed model, on one device or a mesh.
        max_length: most tokens of a prompt and its answer.
        slots: number of rows that are decoded at once; more prompts wait for a row.
        cache_dtype: dtype of the caches, a float dtype or "int8"; default: the model's.
        prefill_chunk: most tokens of prompts that are read at once, rounded up to a multiple of 16.
        draft: most tokens that an augment of a composed model drafts at a time. Answers stay the
            same; the number follows from measured speed, and is 0 if drafts do not pay.
        eos_ids: ids that end an answer; default: the vocabulary's.

    Raises:
        CalmError: a size below 1, caches that do not fit the devices, or a draft of a model without
            an augment that writes, or with one that does not read the anchor's tokens.

    >>> from flax import nnx
    >>> from calm_jax import Decoder, DecoderConfig, Generator, Sampling
    >>> config = DecoderConfig.palm(vocab_size=32, embed_dim=16, num_layers=2, num_heads=2,
    ...                             head_dim=8, mlp_dim=32)
    >>> generator = Generator(Decoder(config, nnx.Rngs(0)), max_length=64)
    >>> answers = generator.generate([[1, 2, 3], [4]], Sampling(max_new_tokens=5, n=2))
    >>> [[len(answer.tokens) for answer in of_prompt] for of_prompt in answers]
    [[5, 5], [5, 5]]
    """

    def __init__(
        self,
        model: Decoder | ComposedDecoder,
        *,
        max_length: int = 2048,
        slots: int = 8,
        cache_dtype: Any = None,
        prefill_chunk: int = 512,
        draft: int = 0,
        eos_ids: Sequence[int] | None = None,
    ):
        self.vocabulary = model.vocabulary
        self.scheduler = Scheduler(
            model,
            max_length=max_length,
            slots=slots,
            cache_dtype=cache_dtype,
            prefill_chunk=prefill_chunk,
            draft=draft,
            eos_ids=eos_ids,
        )

    @property
    def slots(self) -> int:
        """The number of rows that are decoded at once."""
        return self.scheduler.slots

    @property
    def drafting(self) -> Drafting | None:
        """The state of drafting; None without `draft`."""
        return self.scheduler.drafting

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        items: Sequence[Mapping[int, Placed]] | None = None,
    ) -> list[list[Completion]]:
        """The answers to each prompt, `sampling.n` of them.

        Args:
            prompts: texts, which the vocabulary encodes; or token ids, used as they are.
            sampling: for all prompts, or one for each; default: `Sampling()`.
            items: for each prompt, what augments that read features find in it, by their numbers
                (`calm_jax.data.own_features.placed`); default: nothing.

        Raises:
            CalmError: one text instead of a list; text without a vocabulary; a prompt that is
                empty, too long, or has an unknown id; items that do not fit. No prompt is answered
                then.
        """
        prompts = _listed(prompts)
        found = dict(self.as_completed(prompts, sampling, items))
        return [found[index] for index in range(len(prompts))]

    def as_completed(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        items: Sequence[Mapping[int, Placed]] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Each prompt's index and answers, as soon as these are complete, in any order.

        Takes and refuses what `generate` does.
        """
        ids = encode_all(self.vocabulary, _listed(prompts))
        sampling = sampling or Sampling()
        each = [sampling] * len(ids) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(ids):
            raise CalmError(f"{len(each)} samplings were given for {len(ids)} prompts")
        items = _of_each(items, len(ids))
        complete: collections.deque[tuple[int, list[Completion]]] = collections.deque()

        def request(
            index: int, prompt: list[int], one: Sampling, of_prompt: Mapping[int, Placed]
        ) -> Request:
            answers = [WrittenAnswer(self.vocabulary, prompt, one.stop) for _ in range(one.n)]

            def on_news(news: News) -> None:
                answer = answers[news.sample]
                answer.add(news)
                if answer.must_end:
                    self.scheduler.cancel(request, news.sample)
                if all(answer.ended for answer in answers):
                    with_logprobs = one.logprobs is not None
                    complete.append((index, [x.completion(with_logprobs) for x in answers]))

            request = Request(prompt, one, on_news, items=of_prompt)
            return request

        asked = zip(range(len(ids)), ids, each, items, strict=True)
        for _ in self._steps([request(*one) for one in asked]):
            while complete:
                yield complete.popleft()

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        items: Mapping[int, Placed] | None = None,
    ) -> Iterator[str]:
        """The text of one answer as it is generated, never half a character.

        `items` are those of the prompt, as for `generate`.

        Raises:
            CalmError: as `generate`; no vocabulary; `n` above 1; logits that are not finite.
        """
        sampling = sampling or Sampling()
        if self.vocabulary is None:
            raise CalmError("the model has no vocabulary to stream text with; use generate")
        if sampling.n != 1:
            raise CalmError(f"n is {sampling.n}; a stream has one answer")
        ids, come = encode(self.vocabulary, prompt), collections.deque()
        answer = WrittenAnswer(self.vocabulary, ids, sampling.stop)
        request = Request(
            ids, sampling, lambda news: come.append(answer.add(news)), items=items or {}
        )
        self.scheduler.submit(request)
        try:
            while come or not answer.ended:
                if come:
                    if piece := come.popleft():
                        yield piece
                elif not self.scheduler.step(STREAMED_STEPS):
                    raise CalmError("the answer is lost: a dispatch failed while others were made")
            if answer.error:
                raise CalmError(answer.error)
        finally:
            self.scheduler.cancel(request)

    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        items: Sequence[Mapping[int, Placed]] | None = None,
    ) -> list[Score]:
        """How probable each continuation is after its prompt.

        Texts are encoded as one: the continuation's tokens are all that hold text of it, so a token
        across the border, with text of both, is one of them. `items` are those of each prompt, as
        for `generate`.

        Raises:
            CalmError: as `generate`; lists of different lengths; an empty continuation; no token
                that holds only text of the prompt; NaN logits.
        """
        prompts, continuations = _listed(prompts), _listed(continuations)
        if len(prompts) != len(continuations):
            raise CalmError(
                f"{len(continuations)} continuations were given for {len(prompts)} prompts"
            )
        found: list[list[TokenLogprob]] = [[] for _ in prompts]
        requests, tokens, items = [], [], _of_each(items, len(prompts))
        asked = enumerate(zip(prompts, continuations, found, items, strict=True))
        for number, (prompt, continuation, scores, of_prompt) in asked:
            with errors_of_prompt(number):
                before, after = self._split(prompt, continuation)
            tokens.append(after)
            requests.append(
                Request(
                    before + after,
                    None,
                    lambda news, scores=scores: scores.extend(news.logprobs),
                    score_from=len(before),
                    asked=len(before),
                    items=of_prompt,
                )
            )
        for _ in self._steps(requests):
            pass
        for number, scores in enumerate(found):
            if any(math.isnan(one.logprob) for one in scores):
                raise CalmError(f"prompt {number}: the logits of its continuation are NaN")
        return [
            Score(
                sum(one.logprob for one in scores),
                [one.logprob for one in scores],
                all(one.top[0][0] == token for one, token in zip(scores, after, strict=True)),
            )
            for scores, after in zip(found, tokens, strict=True)
        ]

    def _split(self, prompt: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
        before = encode(self.vocabulary, prompt)
        if isinstance(continuation, str):
            if not isinstance(prompt, str):
                raise CalmError("a prompt of ids has a continuation of ids, not of text")
            whole = encode(self.vocabulary, prompt + continuation)
            cut = in_common(before, whole)
            if before and not cut:
                raise CalmError(
                    f"{continuation[:40]!r} changes the first token of {prompt[:40]!r}, which "
                    "nothing precedes"
                )
            before, after = whole[:cut], whole[cut:]
        else:
            after = encode(self.vocabulary, continuation)
        if not before or not after:
            raise CalmError(f"{'a prompt' if not before else 'a continuation'} has no tokens")
        return before, after

    def _steps(self, requests: list[Request]) -> Iterator[None]:
        """Runs all requests to their ends, or none if one is refused; pauses after each step."""
        try:
            self.scheduler.submit(*by_beginning(requests))
            while self.scheduler.step(MOST_STEPS):
                yield
        except BaseException:
            for request in requests:
                self.scheduler.cancel(request)
            raise


def generate(
    model: Decoder | ComposedDecoder,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    **sampling: Any,
) -> np.ndarray:
    """Continues each prompt; without further options with the most probable token each time.

    Args:
        prompts: texts, which `model.vocabulary.encode_sequence` encodes; or token ids, used as
            they are.
        max_new_tokens: number of tokens generated for each prompt.
        eos_id: the token that ends a row; default: any of the vocabulary's `eos_ids`.
        sampling: other fields of `Sampling`, such as `temperature`; `n` answers are n rows.

    Returns:
        int32 [B, max_new_tokens]; after its end token a row is filled with `eos_id`.

    Raises:
        CalmError: a single text instead of a list, text without a vocabulary, an empty prompt, an
            id outside an embedding, an option out of its range, or logits that are not finite.

    >>> from flax import nnx
    >>> from calm_jax import Decoder, DecoderConfig, generate
    >>> config = DecoderConfig.palm(vocab_size=32, embed_dim=16, num_layers=2, num_heads=2,
    ...                             head_dim=8, mlp_dim=32)
    >>> generate(Decoder(config, nnx.Rngs(0)), [[1, 2, 3], [4]], max_new_tokens=5).shape
    (2, 5)
    """
    asked = Sampling(max_new_tokens=max_new_tokens, **sampling)
    if asked.logprobs is not None:
        raise CalmError("generate returns no logprobs; calm_jax.Generator does")
    prompts = _listed(prompts)
    if not prompts:
        return np.zeros((0, max_new_tokens), np.int32)
    ids = encode_all(model.vocabulary, prompts)
    generator = Generator(
        model,
        max_length=max(map(len, ids)) + asked.max_new_tokens,
        slots=min(len(ids) * asked.n, MOST_ROWS),
        eos_ids=None if eos_id is None else (eos_id,),
    )
    answers = [answer for of_prompt in generator.generate(ids, asked) for answer in of_prompt]
    if eos_id is None:
        eos_id = next(iter(() if model.vocabulary is None else model.vocabulary.eos_ids), 0)
    new_BN = np.full((len(answers), max_new_tokens), eos_id, np.int32)
    for number, answer in enumerate(answers):
        if answer.error is not None:
            raise CalmError(f"prompt {number // asked.n}, {answer.error}")
        new_BN[number, : len(answer.tokens)] = answer.tokens
    return new_BN


def encode(vocabulary: Any, prompt: Prompt) -> list[int]:
    """The token ids of a prompt.

    Raises `CalmError` for text without a vocabulary, text that its vocabulary cannot write, and for
    what is neither text nor ids.
    """
    if not isinstance(prompt, str):
        try:
            return [operator.index(token) for token in prompt]
        except TypeError:
            raise CalmError(f"a prompt is a text or a list of token ids, not {prompt!r}") from None
    if vocabulary is None:
        raise CalmError(f"the model has no vocabulary to encode {prompt!r}; give token ids")
    lost = vocabulary.lost_character(prompt)
    if lost is not None:
        raise CalmError(f"the vocabulary has no token for {lost!r} in {prompt[:40]!r}")
    return vocabulary.encode_sequence(prompt)


def encode_all(vocabulary: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The token ids of each prompt; raises as `encode` does, and says which prompt it is."""
    ids = []
    for number, prompt in enumerate(prompts):
        with errors_of_prompt(number):
            ids.append(encode(vocabulary, prompt))
    return ids


@contextlib.contextmanager
def errors_of_prompt(name: int | str) -> Iterator[None]:
    """Lets the message of a `CalmError` say to which prompt it belongs: its number, or more."""
    try:
        yield
    except CalmError as error:
        raise CalmError(f"prompt {name}: {error}") from None


def _listed(prompts: Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        raise CalmError(f"prompts is the text {prompts!r}; give a list of prompts")
    return list(prompts)


def _of_each(items: Sequence[Mapping[int, Placed]] | None, count: int) -> list[Mapping]:
    items = [{}] * count if items is None else list(items)
    if len(items) != count:
        raise CalmError(f"items of {len(items)} prompts were given for {count} prompts")
    return items
