"""Continuous batching: requests wait for a row of the state, and a finished row takes the next one.

When its answer has ended, a row keeps its tokens in the cache until another prompt needs the row. A
prompt that begins with the tokens of a row copies them from there instead of computing them.

If an augment reads answers in tokens of its own, the host makes them of each token of the anchor
(`calm_jax.decoding.own_reading`).

Every process of a run makes the same calls, so all decide the same.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from calm_jax import sharding
from calm_jax.decoding import steps
from calm_jax.decoding.chunks import bucket, buckets, chunk_of
from calm_jax.decoding.draft_length import Drafting, DraftLength
from calm_jax.decoding.memory import check_cache_dtype, check_fits
from calm_jax.decoding.own_reading import OwnReading
from calm_jax.decoding.prepared import known_ids, prepared, rows_of_tables
from calm_jax.decoding.requests import (
    SHARED,
    Answer,
    News,
    Request,
    Row,
    check_request,
    check_size,
    longest_beginning,
    tell,
    token_logprobs,
)
from calm_jax.decoding.rounds import DRAFTER
from calm_jax.decoding.sampling import Choice, Sampling
from calm_jax.decoding.state import News as Made
from calm_jax.decoding.state import State
from calm_jax.errors import CalmError
from calm_jax.mappings import make_room
from calm_jax.models import ComposedDecoder
from calm_jax.models.calling import array_of, on_devices_of
from calm_jax.models.matching import check_shared

MOST_STEPS = 64  # most tokens that one dispatch makes for each row
MOST_FOLLOWED = 1  # that, if augments read the answers in tokens of their own
SHORTEST = 2  # tokens of the shortest prefill, since many prompts differ only in their last ones


class Scheduler:
    """Answers requests to one model. Not thread-safe: one thread must make all calls.

    Arguments and errors are those of `calm_jax.Generator`.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_length: int = 2048,
        slots: int = 8,
        cache_dtype: Any = None,
        prefill_chunk: int = 512,
        draft: int = 0,
        eos_ids: Sequence[int] | None = None,
    ):
        self._waiting = collections.OrderedDict[tuple[Request, int], Answer]()
        check_size("max_length", max_length)
        check_size("slots", slots)
        check_size("prefill_chunk", prefill_chunk)
        check_size("draft", draft, least=0)
        check_cache_dtype(cache_dtype)
        if draft and not isinstance(model, ComposedDecoder):
            raise CalmError(f"draft is {draft}, but the model has no augment that could draft")
        if draft:
            check_shared(model, f"draft={draft}")
        self._drafting = DraftLength(draft) if draft else None
        self.vocabulary = model.vocabulary
        self.max_length, self.slots = max_length, slots
        self.rows_of_tables = rows_of_tables(model)
        self.known = known_ids(model)
        if eos_ids is None:
            eos_ids = () if self.vocabulary is None else self.vocabulary.eos_ids
        elif wrong := [id for id in eos_ids if not 0 <= id < self.known]:
            raise CalmError(f"an end id is {wrong[0]}; the model writes ids below {self.known}")
        self._ends = set(eos_ids)
        self._ends_E = np.array(sorted(self._ends), np.int32)
        # A draft is read before it is known how many of its tokens are accepted.
        length = -(-(max_length + draft) // steps.SCORED) * steps.SCORED
        self._at_once = -(-prefill_chunk // steps.SCORED) * steps.SCORED
        self._chunks = buckets(min(self._at_once, length), SHORTEST)
        # To copy most of the slots out of a row takes longer than to read all.
        self._reads = [size for size in buckets(length, 64) if 2 * size < length] + [length]
        self._model = prepared(model)
        whole = (DRAFTER,) if draft else ()
        sizes = (slots, self._reads, self._chunks, self._at_once, cache_dtype)
        self._own = OwnReading(self._model, *sizes)
        check_fits(self._model, slots, length, cache_dtype, whole, self._own.slots)
        graphdef, self._weights = nnx.split(self._model)
        self._static = steps.Static(graphdef)
        self._array = array_of(self._model)
        self._sizes = (length, cache_dtype, whole)
        self._state: State | None = self._empty_state()
        # A bridge that sees only the prompt reads an answer's tokens differently.
        configs = getattr(model, "configs", ())
        self._prompt_alone = any(config.encoder_only for config in configs)
        self.rows = [Row() for _ in range(slots)]
        self._time = 0

    @property
    def waiting(self) -> int:
        """Number of answers that have no row yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of rows in use."""
        return sum(row.answer is not None for row in self.rows)

    @property
    def drafting(self) -> Drafting | None:
        """The state of drafting; None without `draft`."""
        return None if self._drafting is None else self._drafting.report

    def submit(self, *requests: Request) -> None:
        """Adds requests to the queue, or none if `check` refuses one."""
        for request in requests:
            self.check(request)
        for request in requests:
            for sample in request.samples:
                self._waiting[request, sample] = Answer(request, sample)

    def check(self, request: Request) -> None:
        """Refuses what cannot be answered.

        Raises:
            CalmError: as `requests.check_request`; a character that a tokenizer cannot spell; or
                more inputs of an augment's own than fit the devices.
        """
        rows, most, shapes = self.rows_of_tables, self.max_length, self._own.shapes
        check_request(request, self.vocabulary, rows, self.known, most, shapes)
        request.own = self._own.of(request)

    def cancel(self, request: Request, sample: int | None = None) -> None:
        """Drops a request, or one of its answers, and frees its rows; ignores unknown ones."""
        samples = request.samples if sample is None else [sample]
        for number in samples:
            self._waiting.pop((request, number), None)
        ended = [
            row.answer is not None
            and row.answer.request is request
            and row.answer.sample in samples
            for row in self.rows
        ]
        for row in itertools.compress(self.rows, ended):
            row.answer = None
        if any(ended):
            self._state = steps.end_rows(self._state, np.array(ended))

    def step(self, most: int = MOST_STEPS) -> bool:
        """One dispatch: reads a chunk of prompts, or decodes up to `most` tokens for each row.

        Whatever it raises ends the answers in rows, which get no further news; waiting ones are
        answered by further steps.

        Returns:
            whether there was something to do.
        """
        self._time += 1
        make_room()
        try:
            if self._state is None:
                self._state = self._empty_state()
            with on_devices_of(self._array):
                group = self._to_read()
                if group:
                    self._read(group)
                elif self.running:
                    self._decode(min(most, MOST_STEPS))
                else:
                    return False
        except BaseException:
            # The dispatch has taken the state's arrays.
            self._state, self.rows = None, [Row() for _ in self.rows]
            raise
        return True

    # Prompts.

    def _to_read(self) -> list[Row]:
        """The rows whose prompts the next dispatch reads; together these fit one chunk."""
        group = [row for row in self.rows if row.answer and not row.answer.is_read]
        if group:
            return group[:1]
        size = None
        while self._waiting and any(row.answer is None for row in self.rows):
            answer = next(iter(self._waiting.values()))
            row, source, shared = self._best_row(answer)
            chunk = bucket(self._chunks, len(answer.prompt) - shared)
            # What two prompts share beyond a row's tokens is read once: one waits for the other.
            worth = shared + SHARED
            waits = worth <= answer.shareable and any(
                answer.prompt[:worth] == other.answer.prompt[:worth] for other in group
            )
            if group and (waits or chunk != size or len(group) == self._together(size)):
                break
            self._waiting.popitem(last=False)
            self._keep(row, source, answer, shared)
            row.tokens, row.pending = answer.prompt[:shared], []
            row.answer, answer.read, size = answer, shared, chunk
            group.append(row)
            if len(answer.prompt) - shared > chunk:
                break
        return group

    def _together(self, chunk: int) -> int:
        """The number of prompts that a dispatch reads together."""
        return min(self.slots, max(1, self._at_once // chunk))

    def _best_row(self, answer: Answer) -> tuple[Row, Row | None, int]:
        """A free row for an answer, the row that shares its longest beginning, and its length."""
        free = [row for row in self.rows if row.answer is None]
        in_use = [row for row in self.rows if row.answer is not None]
        own, held = longest_beginning(answer, free, self._prompt_alone)
        source, shared = longest_beginning(answer, in_use, self._prompt_alone)
        if held >= shared:
            source, shared = own, held
        # Few tokens are read faster than a beginning is copied.
        if own is not None and shared - held < SHARED and held * 2 > len(own.tokens):
            return own, own, held
        return min(free, key=lambda row: (len(row.tokens) > 0, row.last_used)), source, shared

    def _keep(self, row: Row, source: Row | None, answer: Answer, count: int) -> None:
        """Keeps `count` tokens of the row `source`, in it or as a copy, for an answer in `row`."""
        number, own = self.rows.index(row), answer.request.own
        row.own = {k: reading.copy(reading.kept(count)) for k, reading in own.items()}
        if source is not None and source is not row:
            # A few more are copied, so that few lengths are compiled; these are overwritten later.
            level = self._own.level([row], count)
            self._state = steps.copy_row(
                self._state,
                np.int32(self.rows.index(source)),
                np.int32(number),
                counts=self._own.reads(level),
            )
        self._state = self._own.keep(self._state, number, row)

    def _read_own(self, rows: list[Row], ends: list[int]) -> None:
        """Makes augments read their own inputs that tokens before `ends` of each row may see."""
        rows = {self.rows.index(row): row for row in rows}
        self._state = self._own.read(self._static, self._weights, self._state, rows, ends)

    def _read(self, group: list[Row]) -> None:
        answers = [row.answer for row in group]
        sizes = [len(answer.prompt) - answer.read for answer in answers]
        T = bucket(self._chunks, max(sizes))
        ends = [answer.read + min(size, T) for answer, size in zip(answers, sizes, strict=True)]
        self._read_own(group, ends)
        P = 1 if len(group) == 1 else self._together(T)
        if self._state.seen_BV is None and any(answer.penalty for answer in answers):
            shape = (self.slots, self.known)
            self._state = dataclasses.replace(self._state, seen_BV=np.zeros(shape, bool))
        known = None if self._state.seen_BV is None else self.known
        numbers = list(map(self.rows.index, group))
        places = numbers if self.slots == P else range(len(group))
        chunk = chunk_of(
            answers, numbers, places, count=P, tokens=T, no_row=self.slots, known=known
        )
        scored = any(answer.request.score_from is not None for answer in answers)
        level = self._own.level(group, max(answer.read for answer in answers) + T)
        self._state, news, scores = steps.prefill(
            self._static,
            self._weights,
            self._state,
            chunk,
            self._ends_E,
            known=self.known,
            reads=self._own.reads(level),
            scored=scored,
            top=min(max(answer.top for answer in answers), self.known),
        )
        news, scores = jax.tree.map(sharding.on_host, (news, scores))
        start_P, length_P = chunk.start_P, chunk.length_P
        # Only now do the rows hold these tokens: an earlier failure leaves no trace.
        for place, row, answer in zip(places, group, answers, strict=True):
            size = int(length_P[place])
            row.tokens += answer.prompt[answer.read : answer.read + size]
            answer.read += size
            row.prompt_length = min(len(row.tokens), answer.request.asked)
            row.last_used = self._time
        told = []
        for place, row, answer in zip(places, group, answers, strict=True):
            made = jax.tree.map(lambda x, n=place: x[None, n], news)
            if answer.most and not news.is_number[place]:
                # At once, whatever of the prompt is left: a cancelled row would keep its NaN.
                told.append(self._news(row, made))
                continue
            if answer.request.score_from is not None:
                answer.keep_scores(start_P[place], length_P[place], *[x[place] for x in scores])
            if not answer.is_read:
                continue
            if answer.request.score_from is not None and answer.sample == 0:
                reason = "length" if answer.most == 0 else None
                told.append((answer.request, News(-1, [], answer.scores, reason)))
            if answer.most == 0:
                row.answer = None
                if not news.is_number[place]:
                    self._clear(row)
            else:
                told.append(self._news(row, made))
        tell(told)

    # Answers.

    def _decode(self, most: int) -> None:
        running = [row for row in self.rows if row.answer is not None]
        longest = max(len(row.tokens) for row in running)
        if self._own.follow:
            most = MOST_FOLLOWED
            for row, number in itertools.product(running, self._own.follow):
                row.own[number].add(*row.pending)
            self._read_own(running, [len(row.tokens) + 1 for row in running])
        draft = self._drafting.begin() if self._drafting else 0
        places = draft + 1  # most tokens that a round makes
        level = self._own.level(running, longest + places)
        read = self._reads[level]
        top = max(row.answer.top for row in running)
        self._state, news, counts = steps.decode(
            self._static,
            self._weights,
            self._state,
            self._ends_E,
            np.int32(max(1, min(most, read - longest) // places)),
            np.bool_(len(self._waiting) > 0),
            known=self.known,
            reads=self._own.reads(level),
            most=-(-(MOST_FOLLOWED if self._own.follow else MOST_STEPS) // places),
            top=min(top, self.known),
            draft=draft,
        )
        news, counts = jax.tree.map(sharding.on_host, (news, counts))
        if self._drafting:
            rounds = int(np.sum(np.any(news.made[::places], axis=1)))
            self._drafting.end((read, top, self._state.seen_BV is None), rounds, *map(int, counts))
        told = []
        for number, row in enumerate(self.rows):
            if row.answer is not None:
                row.last_used = self._time
                made = news.made[:, number]
                told.append(
                    self._news(row, jax.tree.map(lambda x, n=number, m=made: x[m, n], news))
                )
        tell(told)

    def _news(self, row: Row, news: Made) -> tuple[Request, News]:
        """The request's news of new tokens [N]; frees the row if the answer has ended."""
        answer = row.answer
        sampling, tokens = answer.request.sampling, [int(token) for token in news.tokens]
        error = reason = None
        if not np.all(news.is_number):
            count = int(np.argmin(news.is_number))
            error = f"step {answer.made + count}: the logits are not finite numbers"
            reason, tokens = "error", tokens[:count]
        elif tokens and tokens[-1] in self._ends:
            reason = "stop"
        elif answer.made + len(tokens) == answer.most:
            reason = "length"
        logprobs = token_logprobs(news, sampling.logprobs)[: len(tokens)]
        # The last token is not in the cache yet: the next step reads it.
        row.tokens += [*row.pending, *tokens[:-1]]
        row.pending = tokens[-1:]
        answer.made += len(tokens)
        if reason is not None:
            row.answer = None
        if reason == "error":
            self._clear(row)
        return answer.request, News(answer.sample, tokens, logprobs, reason, error)

    def _clear(self, row: Row) -> None:
        """Clears a row with NaN, which would spread even to queries that do not see it."""
        row.tokens, row.own = [], {}
        self._state = steps.clear_row(self._state, np.int32(self.rows.index(row)))

    def _empty_state(self) -> State:
        length, cache_dtype, whole = self._sizes
        # A decoder takes neither.
        options = {k: x for k, x in (("whole", whole), ("own", self._own.slots)) if x}
        with on_devices_of(self._array):
            cache = self._model.init_cache(self.slots, length, dtype=cache_dtype, **options)
            return steps.begin(self._weights, cache, Choice.of([(Sampling(), 0)] * self.slots))
