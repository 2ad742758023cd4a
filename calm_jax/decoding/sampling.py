"""How the next token is chosen: the options of users, and the functions that apply them.

Axes: B row, V vocabulary, k most probable tokens.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.errors import CalmError

MOST_LOGPROBS = 20  # most tokens to list at one position
MASKED = -1e30
_SMALLEST, _LARGEST = 1e-30, 1e30  # of options, apart from 0


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The options of the answers to one prompt.

    The same prompt, seed and options give the same tokens in any batch and row. A program of
    another shape may round logits differently; that changes a token only if its probability was
    within the rounding of the random number.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: only the k most probable tokens; 0: all.
        top_p: only the most probable tokens, up to this total probability.
        min_p: only tokens at least this fraction as probable as the most probable one.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in the
            prompt or the answer (CTRL, arXiv 1909.05858 §4.1).
        stop: texts before which an answer ends; special tokens may be written in them.
        n: number of answers.
        seed: seed of all random numbers.
        logprobs: None: none are returned; k: those of the tokens and of the k most probable.

    Raises:
        CalmError: a value is out of range, NaN, or without effect given another.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    n: int = 1
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not isinstance(self.stop, Iterable):
            raise CalmError(f"stop is {self.stop!r}; it must be a text or several")
        object.__setattr__(self, "stop", tuple(self.stop))
        for name, low, high in (
            ("max_new_tokens", 1, None),
            ("top_k", 0, None),
            ("n", 1, None),
            ("seed", 0, 2**63 - 1),
            ("logprobs", 0, MOST_LOGPROBS),
            ("temperature", 0.0, None),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, None),
        ):
            self._check(name, low, high, whole=isinstance(low, int))
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise CalmError(f"{name} is 0; it must be above 0")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise CalmError(f"stop has {text!r}; it must hold texts that are not empty")
        if self.temperature == 0:
            for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
                if getattr(self, name) != neutral:
                    raise CalmError(
                        f"{name} is {getattr(self, name)}, but temperature is 0, which takes the "
                        "most probable token; give a temperature"
                    )

    def _check(self, name: str, low: float, high: float | None, *, whole: bool) -> None:
        value = getattr(self, name)
        if value is None and name == "logprobs":
            return
        kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
        if isinstance(value, bool) or not isinstance(value, kinds):
            kind = "an integer" if whole else "a number"
            raise CalmError(f"{name} is {value!r}; it must be {kind}")
        if not math.isfinite(value) or value < low or (high is not None and value > high):
            least = "finite and at least" if value == math.inf else "at least"
            bounds = f"{least} {low}" if high is None else f"from {low} to {high}"
            raise CalmError(f"{name} is {value}; it must be {bounds}")
        if not whole and value and not _SMALLEST <= value <= _LARGEST:
            line = f"it must be from {_SMALLEST} to {_LARGEST}, as float32 can hold"
            raise CalmError(f"{name} is {value}; {line}")
        object.__setattr__(self, name, (int if whole else float)(value))


class TokenLogprob(NamedTuple):
    """The log-probability of a token, and (id, log-probability) of the most probable ones.

    Natural logarithms of the model's own probabilities, before temperature and filters.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """The sampling options of rows, each [B]; `seed_B2` is uint32 [B, 2]."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    penalty_B: jax.Array
    seed_B2: jax.Array
    sample_B: jax.Array

    @classmethod
    def of(cls, rows: list[tuple[Sampling, int]]) -> "Choice":
        """The options of (sampling, number of the sample) pairs, as NumPy arrays."""

        def floats(name):
            return np.array([getattr(sampling, name) for sampling, _ in rows], np.float32)

        seeds = [sampling.seed for sampling, _ in rows]
        return cls(
            floats("temperature"),
            np.array([min(sampling.top_k, 2**31 - 1) for sampling, _ in rows], np.int32),
            floats("top_p"),
            floats("min_p"),
            floats("repetition_penalty"),
            np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32),
            np.array([sample for _, sample in rows], np.int32),
        )


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Logits with the repetition penalty on tokens that were seen (bool [B, V])."""
    penalty_B1 = penalty_B[:, None]
    lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, lower_BV, logits_BV)


def filtered(logits_BV: jax.Array, choice: Choice) -> jax.Array:
    """Logits divided by the temperature, `MASKED` for tokens that top-k, top-p or min-p exclude.

    As in transformers, each filter uses the probabilities of tokens that earlier filters kept.
    """
    logits_BV /= jnp.maximum(choice.temperature_B, 1e-6)[:, None]

    def cut(logits_BV):
        V = logits_BV.shape[1]
        ordered_BV = -jnp.sort(-logits_BV, axis=1)
        k_B = jnp.where(choice.top_k_B == 0, V, jnp.minimum(choice.top_k_B, V))
        ordered_BV = jnp.where(jnp.arange(V) < k_B[:, None], ordered_BV, MASKED)
        probabilities_BV = jax.nn.softmax(ordered_BV, axis=1)
        before_BV = jnp.cumsum(probabilities_BV, axis=1) - probabilities_BV
        # With top_p 1, rounding would drop a row's last tokens.
        kept_BV = (before_BV < choice.top_p_B[:, None]) | (choice.top_p_B[:, None] >= 1)
        kept_BV &= probabilities_BV >= choice.min_p_B[:, None] * probabilities_BV[:, :1]
        kept_BV &= ordered_BV > MASKED
        # The most probable token is always kept.
        last_B1 = jnp.maximum(jnp.sum(kept_BV, axis=1, keepdims=True) - 1, 0)
        lowest_B1 = jnp.take_along_axis(ordered_BV, last_B1, axis=1)
        return jnp.where(logits_BV >= lowest_B1, logits_BV, MASKED)

    cuts_B = (choice.top_k_B > 0) | (choice.top_p_B < 1) | (choice.min_p_B > 0)
    return jax.lax.cond(jnp.any(cuts_B), cut, lambda x: x, logits_BV)


def random_keys(choice: Choice, place_B: jax.Array) -> jax.Array:
    """A key for each row, from its seed, sample and the number of the token in its answer."""

    def key(seed_2, sample, place):
        key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(key, sample), place)

    return jax.vmap(key)(choice.seed_B2, choice.sample_B, place_B)


def choose(logits_BV: jax.Array, choice: Choice, place_B: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B]; logits are float32 [B, V]."""
    greedy_B = jnp.argmax(logits_BV, axis=1).astype(jnp.int32)

    def drawn(logits_BV):
        keys_B = random_keys(choice, place_B)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, filtered(logits_BV, choice))
        return jnp.where(choice.temperature_B == 0, greedy_B, drawn_B.astype(jnp.int32))

    return jax.lax.cond(jnp.any(choice.temperature_B > 0), drawn, lambda _: greedy_B, logits_BV)


def log_probabilities(
    logits_BV: jax.Array, tokens_B: jax.Array, top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Those of tokens int32 [B], float32 [B]; the `top` most probable, int32, float32 [B, top]."""
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=1)
    of_tokens_B = jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=1)[:, 0]
    logprobs_Bk, ids_Bk = jax.lax.top_k(logprobs_BV, top)
    return of_tokens_B, ids_Bk, logprobs_Bk
