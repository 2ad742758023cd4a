"""Requests to a scheduler, its news, and its records of each answer and row."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from calm_jax.data.own_features import Placed, check_items
from calm_jax.data.vocabulary import check_ids
from calm_jax.decoding.sampling import Sampling, TokenLogprob
from calm_jax.errors import CalmError

SHARED = 16  # least tokens of a shared beginning that is worth copying
GENERATIONS = 8  # of families in families; within the last, prompts stand by their ids
ENDLESS = 2**31 - 1  # more tokens than any row has
TOPS = (0, 1, 5, 20)  # numbers of most probable tokens for which programs are compiled


class News(NamedTuple):
    """New results of a request.

    Attributes:
        sample: the number of the answer; -1: scores of the prompt.
        tokens: new tokens of the answer.
        logprobs: one for each token, if asked for; for the prompt, from `score_from` on.
        finish_reason: None: more follows; "stop": an end token; "length"; "error".
        error: what went wrong.
    """

    sample: int
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None = None
    error: str | None = None


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt, and what is requested for it.

    Attributes:
        prompt: token ids.
        sampling: options of its answers; None: only the prompt is scored.
        on_news: called with `News`, inside `Scheduler.step`.
        score_from: index, from 1, of the first prompt token whose log-probability is returned.
        asked: number of tokens visible to a bridge that sees only the prompt; default: all.
        items: what augments that read features find in the prompt, by their numbers.
        own: the inputs of augments with inputs of their own, by their numbers, of which the
            scheduler makes copies (`calm_jax.decoding.own_rows`).
    """

    prompt: list[int]
    sampling: Sampling | None
    on_news: Callable[[News], None]
    score_from: int | None = None
    asked: int | None = None
    items: Mapping[int, Placed] = dataclasses.field(default_factory=dict)
    own: Mapping[int, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.asked is None:
            self.asked = len(self.prompt)

    @property
    def samples(self) -> range:
        """The numbers of its answers."""
        return range(1 if self.sampling is None else self.sampling.n)


@dataclasses.dataclass(eq=False)
class Answer:
    """One answer of a request, waiting or in a row."""

    request: Request
    sample: int
    read: int = 0  # tokens of the prompt that are in the cache
    made: int = 0
    scores: list[TokenLogprob] = dataclasses.field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        return self.request.prompt

    @property
    def shareable(self) -> int:
        """Tokens of the prompt that may come from a row that has read them.

        The last one is read again, since its logits are needed; so are those before a score.
        """
        return (self.request.score_from or len(self.prompt)) - 1

    @property
    def is_read(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.read == len(self.prompt)

    @property
    def most(self) -> int:
        """Longest answer, in tokens; 0 if the prompt is only scored."""
        return 0 if self.request.sampling is None else self.request.sampling.max_new_tokens

    def keep_scores(
        self, start: int, size: int, logprobs_T: Any, top_ids_Tk: Any, top_logprobs_Tk: Any
    ) -> None:
        """Takes what `size` tokens of the prompt from index `start` say of those after them."""
        for place in range(size):
            index = start + place + 1  # of the token whose score stands at this place
            if self.request.score_from <= index < len(self.prompt):
                self.scores.append(
                    token_logprob(logprobs_T[place], top_ids_Tk[place], top_logprobs_Tk[place])
                )

    @property
    def top(self) -> int:
        """How many of the most probable tokens to compute."""
        sampling = self.request.sampling
        asked = sampling.logprobs or 0 if sampling is not None else 1
        return next(top for top in TOPS if top >= asked)

    @property
    def penalty(self) -> bool:
        """Whether there is a repetition penalty, which needs the tokens that were seen."""
        sampling = self.request.sampling
        return sampling is not None and sampling.repetition_penalty != 1.0


@dataclasses.dataclass(eq=False)
class Row:
    """A row of the state: the tokens in its cache, and the answer that it generates.

    `own` are the inputs of augments with inputs of their own, as of the answer's request.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    own: dict[int, Any] = dataclasses.field(default_factory=dict)
    prompt_length: int = 0  # how many of `tokens` were read as a prompt
    pending: list[int] = dataclasses.field(default_factory=list)  # made, but not yet in the cache
    answer: Answer | None = None
    last_used: int = 0


def check_size(name: str, value: Any, least: int = 1) -> None:
    """Raises `CalmError` unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CalmError(f"{name} is {value!r}; it must be an integer of at least {least}")


def check_request(
    request: Request,
    vocabulary: Any,
    rows: int,
    known: int,
    max_length: int,
    shapes: Mapping[int, tuple[int, int]],
) -> None:
    """Refuses what cannot be answered.

    Args:
        rows: number of ids, from 0, that the model embeds.
        known: number of ids, from 0, that may be chosen.
        shapes: the `item_shape` of each augment that reads features, by its number.

    Raises:
        CalmError: an empty prompt, an id outside an embedding, more tokens than `max_length`, or
            items that no augment reads.
    """
    prompt, sampling = request.prompt, request.sampling
    if not prompt:
        raise CalmError("an empty prompt has no next token; give at least one id")
    check_ids(prompt, rows, "prompt", vocabulary)
    for number, placed in request.items.items():
        if number not in shapes:
            raise CalmError(f"items are given for augment {number}, which reads no features")
        check_items(number, shapes[number], placed.items)
        if max(placed.order, default=0) >= len(prompt):
            raise CalmError(
                f"an item for augment {number} stands at index {max(placed.order)}, but the prompt "
                f"has {len(prompt)} tokens"
            )
    new = 0 if sampling is None else sampling.max_new_tokens
    if len(prompt) + new > max_length:
        raise CalmError(
            f"the prompt has {len(prompt)} tokens and max_new_tokens is {new}, together more "
            f"than max_length {max_length}"
        )
    if request.score_from is not None:
        if not 1 <= request.score_from <= len(prompt):
            raise CalmError(
                f"score_from is {request.score_from}; it must be from 1 to the prompt's "
                f"length, {len(prompt)}"
            )
        check_ids(prompt[request.score_from :], known, "scored", vocabulary)


def common(ours: list[int], theirs: list[int], most: int) -> int:
    """Length, up to `most`, of the common prefix of two lists with at least `most` tokens."""
    if ours[:most] == theirs[:most]:
        return most
    return int(np.argmin(np.equal(ours[:most], theirs[:most])))


def by_beginning(requests: Sequence[Request]) -> list[Request]:
    """Requests in an order in which rows are copied and read together as much as possible.

    Prompts that have more in common with each other than apart stand together, and so on beyond
    what they have in common; otherwise the shorter ones come first.
    """
    return _by_family(sorted(requests, key=lambda request: request.prompt), 0, GENERATIONS)


def _by_family(by_ids: list[Request], shared: int, generations: int) -> list[Request]:
    """Sorted requests, all with the same first `shared` tokens, by families and their families."""
    families: list[list[Request]] = []
    for request in by_ids:
        if families and _are_family(families[-1][-1].prompt, request.prompt, shared):
            families[-1].append(request)
        else:
            families.append([request])
    for index, family in enumerate(families):
        all_share = in_common(family[0].prompt, family[-1].prompt)
        if generations and len(family) > 1 and all_share > shared:
            families[index] = _by_family(family, all_share, generations - 1)
    families.sort(key=lambda family: len(family[0].prompt))
    return [request for family in families for request in family]


def _are_family(ours: list[int], theirs: list[int], shared: int) -> bool:
    more = in_common(ours, theirs) - shared
    return more >= SHARED and 2 * more >= min(len(ours), len(theirs)) - shared


def in_common(ours: list[int], theirs: list[int]) -> int:
    """Length of the common prefix of two lists."""
    return common(ours, theirs, min(len(ours), len(theirs)))


def longest_beginning(
    answer: Answer, rows: Sequence[Row], prompt_alone: bool
) -> tuple[Row | None, int]:
    """The row that shares the longest beginning with a prompt, and its length.

    None and 0 if all that is shared is shorter than `SHARED`. `prompt_alone`: whether only what a
    row read as a prompt counts.
    """
    found, shared = None, SHARED - 1
    for row in rows:
        held = row.prompt_length if prompt_alone else len(row.tokens)
        most = min(held, len(row.tokens), answer.shareable)
        # Most rows differ where they would have to be the same to be longer.
        if most > shared and row.tokens[shared] == answer.prompt[shared]:
            length = common(row.tokens, answer.prompt, most)
            for number, ours in answer.request.own.items():
                length = min(length, seen_alike(ours, row.own[number]))
            if length > shared:
                found, shared = row, length
    return found, 0 if found is None else shared


def seen_alike(ours: Any, theirs: Any) -> int:
    """How many of the first tokens of two rows see the same inputs of an augment's own."""
    same = ours.same(theirs)
    return min([*ours.order[same:], *theirs.order[same:]], default=ENDLESS)


def token_logprob(logprob: Any, ids: Any, logprobs: Any) -> TokenLogprob:
    """A token's log-probability; `ids` and `logprobs` [k] are those of the most probable tokens."""
    return TokenLogprob(
        float(logprob), tuple((int(i), float(x)) for i, x in zip(ids, logprobs, strict=True))
    )


def token_logprobs(news: Any, most: int | None) -> list[TokenLogprob]:
    """Those of a row's new tokens in `state.News`, each with up to `most` others; None: none."""
    if most is None:
        return []
    rows = zip(news.logprobs, news.top_ids, news.top_logprobs, strict=True)
    return [token_logprob(logprob, ids[:most], top[:most]) for logprob, ids, top in rows]


def tell(told: list[tuple[Request, News]]) -> None:
    """Hands news to their requests, once all is recorded, since a request may then cancel."""
    for request, news in told:
        request.on_news(news)
