"""What is asked of a scheduler, what it tells, and what it keeps of each answer and row."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from calm_jax.decoding.sampling import Sampling, TokenLogprob

TOPS = (0, 1, 5, 20)  # numbers of most probable tokens that are compiled for


class News(NamedTuple):
    """What has come of a request.

    Attributes:
        sample: the number of the answer; -1: scores of the prompt.
        tokens: new tokens of the answer.
        logprobs: one for each token, if asked for; of the prompt, one from `score_from` on.
        finish_reason: None: more is to come; "stop": an end token; "length"; "error".
        error: what went wrong.
    """

    sample: int
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None = None
    error: str | None = None


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt, and what is asked of it.

    Attributes:
        prompt: token ids.
        sampling: of its answers; None: only the prompt is scored.
        on_news: is called with `News`, inside `Scheduler.step`.
        score_from: index of the first prompt token whose log-probability is told, from 1.
        asked: number of tokens that an augment which sees the prompt alone may see; default: all.
    """

    prompt: list[int]
    sampling: Sampling | None
    on_news: Callable[[News], None]
    score_from: int | None = None
    asked: int | None = None

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

        The last one is read anew, since its logits are needed; so are those before a score.
        """
        return (self.request.score_from or len(self.prompt)) - 1

    @property
    def is_read(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.read == len(self.prompt)

    @property
    def most(self) -> int:
        """Length of the answer at most; 0 where the prompt is only scored."""
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
        """Whether tokens that were seen count."""
        sampling = self.request.sampling
        return sampling is not None and sampling.repetition_penalty != 1.0


@dataclasses.dataclass(eq=False)
class Row:
    """A row of the state: the tokens that its cache holds, and the answer that it makes."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    prompt_length: int = 0  # of `tokens`, how many were read as a prompt
    pending: list[int] = dataclasses.field(default_factory=list)  # made, and not in the cache yet
    answer: Answer | None = None
    last_used: int = 0


def common(ours: list[int], theirs: list[int], most: int) -> int:
    """Length of the beginning that two lists of at least `most` tokens share, up to `most`."""
    if ours[:most] == theirs[:most]:
        return most
    return int(np.argmin(np.equal(ours[:most], theirs[:most])))


def token_logprob(logprob: Any, ids: Any, logprobs: Any) -> TokenLogprob:
    """The log-probability of a token; `ids` and `logprobs` [k] are of the most probable ones."""
    return TokenLogprob(
        float(logprob), tuple((int(i), float(x)) for i, x in zip(ids, logprobs, strict=True))
    )
