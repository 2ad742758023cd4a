"""Answers of models whose augments read what the anchor cannot: computed anew for each token.

Such an augment has a tokenizer of its own, or reads features that stand in the prompt. What it
reads follows from the text so far, which only the host knows. So each step runs the whole model,
without caches, over all tokens of all rows, and adds a token to each.

Axes: B row, T position, D model width, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm_jax import sharding
from calm_jax.data import own_features
from calm_jax.data.alignment import Aligned, Reader
from calm_jax.data.own_features import Placed
from calm_jax.data.own_tokens import alignments, own_arrays, padded
from calm_jax.decoding.chunks import bucket, buckets
from calm_jax.decoding.prepared import known_ids, rows_of_tables
from calm_jax.decoding.requests import (
    Answer,
    News,
    Queue,
    Request,
    check_request,
    check_size,
    token_logprob,
)
from calm_jax.decoding.sampling import Choice, Sampling, choose, log_probabilities, penalised
from calm_jax.decoding.steps import SCORED, scores
from calm_jax.models import ComposedDecoder, Inputs
from calm_jax.models.calling import on_devices_of
from calm_jax.models.taps import item_shape

SHORTEST = 16  # positions of the shortest rows; longer ones are rounded up to few lengths


class Recomputing(Queue):
    """What `Scheduler` is for other models, with the same calls.

    Args:
        max_length: most tokens of a prompt and its answer.
        slots: number of rows that are computed at once.
        eos_ids: ids that end an answer; default: the vocabulary's.

    Raises:
        CalmError: a size below 1, or an augment that reads tokens and is no decoder.
    """

    drafting = None

    def __init__(
        self,
        model: ComposedDecoder,
        *,
        max_length: int,
        slots: int,
        eos_ids: Sequence[int] | None = None,
    ):
        super().__init__()
        check_size("max_length", max_length)
        check_size("slots", slots)
        self.vocabulary, self.max_length, self.slots = model.vocabulary, max_length, slots
        self.known, self._rows_of_tables = known_ids(model), rows_of_tables(model)
        if eos_ids is None:
            eos_ids = () if self.vocabulary is None else self.vocabulary.eos_ids
        self._ends = set(eos_ids)
        vocabularies = [getattr(augment, "vocabulary", None) for augment in model.augments]
        self._alignments = alignments(self.vocabulary, vocabularies)
        shapes = {number: item_shape(augment) for number, augment in enumerate(model.augments)}
        self._shapes = {number: shape for number, shape in shapes.items() if shape is not None}
        self._model = model
        self._lengths = buckets(-(-max_length // SCORED) * SCORED, SHORTEST)
        self._rows: list[_Row] = []

    @property
    def running(self) -> int:
        """Number of rows in use."""
        return len(self._rows)

    def check(self, request: Request) -> None:
        """Refuses what cannot be answered.

        Raises:
            CalmError: as `requests.check_request`, or a character that a tokenizer cannot spell.
        """
        sizes = (self._rows_of_tables, self.known, self.max_length)
        check_request(request, self.vocabulary, *sizes, self._shapes)
        for alignment in self._alignments.values():
            alignment.align([request.prompt], [request.asked], check=True)

    def cancel(self, request: Request, sample: int | None = None) -> None:
        """Drops a request, or one of its answers; ignores unknown ones."""
        samples = self.withdraw(request, sample)
        self._rows = [
            row
            for row in self._rows
            if row.answer.request is not request or row.answer.sample not in samples
        ]

    def step(self, most: int = 1) -> bool:
        """Adds a token to each row, whatever `most` is; returns whether there was one."""
        while self._waiting and len(self._rows) < self.slots:
            _, answer = self._waiting.popitem(last=False)
            self._rows.append(_Row(answer, self._alignments))
        if not self._rows:
            return False
        rows = list(self._rows)
        try:
            found = self._computed(rows)
        except BaseException:
            self._rows = []
            raise
        for place, row in enumerate(rows):
            for request, news in self._told(row, jax.tree.map(lambda x, n=place: x[n], found)):
                request.on_news(news)
        return True

    def _computed(self, rows: list["_Row"]) -> tuple[tuple, tuple | None]:
        """The next token of each row, and the scores of the tokens of prompts to score."""
        B, T = self.slots, bucket(self._lengths, max(len(row.tokens) for row in rows))
        # Rows that are not in use hold one token of padding, so that few programs are compiled.
        ids = [row.tokens for row in rows] + [[]] * (B - len(rows))
        length_B = np.array([max(len(row), 1) for row in ids], np.int32)
        asked = [row.answer.request.asked for row in rows] + [0] * (B - len(rows))
        batch = {
            "decoder_input_tokens": padded(ids, T),
            "decoder_segment_ids": padded([[1] * len(row) for row in ids], T),
            "decoder_positions": padded([range(len(row)) for row in ids], T),
            "decoder_causal_attention": padded([[1] * count for count in asked], T),
        }
        for number in self._alignments:
            own = [row.own[number] for row in rows] + [Aligned([], [])] * (B - len(rows))
            S = bucket(buckets(1 << 30, SHORTEST), max(len(each.ids) for each in own))
            batch |= own_arrays(number, own, asked, S)
        for number, shape in self._shapes.items():
            placed = [row.answer.request.items.get(number, Placed()) for row in rows]
            placed += [Placed()] * (B - len(rows))
            batch |= own_features.own_arrays(number, shape, placed, batch)
        answers = [row.answer for row in rows]
        choices = [(a.request.sampling or Sampling(), a.sample) for a in answers]
        choice = Choice.of(choices + [(Sampling(), 0)] * (B - len(rows)))
        made_B = np.array([a.made for a in answers] + [0] * (B - len(rows)), np.int32)
        scored = any(a.request.score_from is not None and not a.made for a in answers)
        with on_devices_of(self._model):
            graphdef, weights = nnx.split(self._model)
            found = _next_tokens(
                graphdef,
                weights,
                batch,
                length_B,
                choice,
                made_B,
                known=self.known,
                top=min(max(answer.top for answer in answers), self.known),
                penalty=any(answer.penalty for answer in answers),
                scored=scored,
            )
        return jax.tree.map(sharding.on_host, found)

    def _told(self, row: "_Row", found: tuple[tuple, tuple | None]) -> list[tuple[Request, News]]:
        """The news of a row's next token; frees the row if its answer has ended."""
        (token, logprob, top_ids, top_logprobs, is_number), of_prompt = found
        answer, told = row.answer, []
        request, sampling = answer.request, answer.request.sampling
        if request.score_from is not None and not answer.made:
            answer.keep_scores(0, len(answer.prompt), *of_prompt)
            if answer.sample == 0:
                reason = "length" if answer.most == 0 else None
                told.append((request, News(-1, [], answer.scores, reason)))
        if answer.most == 0:
            self._rows.remove(row)
            return told
        if not is_number:
            error = f"step {answer.made}: the logits are not finite numbers"
            self._rows.remove(row)
            return [*told, (request, News(answer.sample, [], [], "error", error))]
        row.add(int(token))
        answer.made += 1
        reason = None
        if int(token) in self._ends:
            reason = "stop"
        elif answer.made == answer.most:
            reason = "length"
        if reason is not None:
            self._rows.remove(row)
        most = sampling.logprobs
        logprobs = (
            [] if most is None else [token_logprob(logprob, top_ids[:most], top_logprobs[:most])]
        )
        return [*told, (request, News(answer.sample, [int(token)], logprobs, reason))]


class _Row:
    """An answer's tokens so far, and what each augment reads of them, by its number."""

    def __init__(self, answer: Answer, alignments: dict[int, Any]):
        self.answer, self._alignments = answer, alignments
        self._readers = {number: Reader(of) for number, of in alignments.items()}
        self.own = {
            number: Aligned(list(of.augment.start_ids), [0] * len(of.augment.start_ids))
            for number, of in alignments.items()
        }
        self.tokens: list[int] = []
        for token in answer.prompt:
            self.add(token)

    def add(self, token: int) -> None:
        """Takes the next token of the anchor."""
        self.tokens.append(token)
        closes = len(self.tokens) == self.answer.request.asked
        for number, reader in self._readers.items():
            pieces = reader.read(token, closes)
            for piece, ids in zip(pieces, self._alignments[number].encode(pieces), strict=True):
                self.own[number].ids.extend(ids)
                self.own[number].order.extend([piece.order] * len(ids))


@functools.partial(
    jax.jit, static_argnames=("graphdef", "known", "top", "penalty", "scored"), inline=False
)
def _next_tokens(
    graphdef, weights, batch, length_B, choice, made_B, *, known, top, penalty, scored
) -> tuple[tuple, tuple | None]:
    """The next token [B], its log-probability, the `top` most probable tokens and theirs, whether
    the logits are numbers; and the same log-probabilities of each token [B, T] after the first."""
    model = nnx.merge(graphdef, weights)
    h_BTD, _ = model.residual(Inputs.of_batch(batch))
    tokens_BT = batch["decoder_input_tokens"]
    h_B1D = jnp.take_along_axis(h_BTD, (length_B - 1)[:, None, None], axis=1)
    logits_BV = model.logits(h_B1D)[:, 0, :known]
    chosen_BV = logits_BV
    if penalty:
        real_BT = batch["decoder_segment_ids"] != 0
        seen = jax.vmap(lambda ids_T: jnp.zeros(known, bool).at[ids_T].set(True, mode="drop"))
        seen_BV = seen(jnp.where(real_BT, tokens_BT, known))
        chosen_BV = penalised(logits_BV, seen_BV, choice.penalty_B)
    token_B = choose(chosen_BV, choice, made_B)
    is_number_B = jnp.all(jnp.isfinite(logits_BV), axis=1)
    found = (token_B, *log_probabilities(logits_BV, token_B, top), is_number_B)
    if not scored:
        return found, None
    return found, scores(model, h_BTD, jnp.roll(tokens_BT, -1, axis=1), known, top)
