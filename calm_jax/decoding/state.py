"""What decoding remembers on the devices, what a step reads, and what it tells.

Axes: B row of the state, P row of a prefill, T position in a chunk, V vocabulary, N decoding step,
k most probable tokens.
"""

import dataclasses
from typing import Any

import jax

from calm_jax.decoding.sampling import Choice


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that decoding remembers on the devices.

    Attributes:
        cache: the model's, with B rows.
        token_B: int32 [B], the last token of each row, which is not in the cache yet.
        made_B: int32 [B], number of tokens in the row's answer.
        left_B: int32 [B], number of tokens that the answer may still get; 0: the row is idle.
        choice: the sampling options of each row.
        seen_BV: bool [B, V], the tokens that a row has; None while no row has a penalty.
    """

    cache: Any
    token_B: jax.Array
    made_B: jax.Array
    left_B: jax.Array
    choice: Choice
    seen_BV: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens of some prompts; a row of B or more is no row.

    Attributes:
        tokens_PT: int32 [P, T].
        next_PT: int32 [P, T], the token after each, of which the log-probability is told.
        length_P: int32 [P], number of tokens that are not padding.
        rows_P: int32 [P], rows of the state.
        start_P: int32 [P], number of tokens of the row that stay in the cache.
        prompt_P: int32 [P], number of tokens of the row that are a prompt.
        left_P: int32 [P], length of the answer at most; 0: the prompt goes on, or nothing is asked.
        choice: the sampling options, [P].
        seen_PV: bool [P, V], the tokens of the whole prompt; None as in the state.
    """

    tokens_PT: Any
    next_PT: Any
    length_P: Any
    rows_P: Any
    start_P: Any
    left_P: Any
    prompt_P: Any
    choice: Choice
    seen_PV: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class News:
    """What a step made: arrays whose last axes are tokens, and the `top` most probable ones.

    Attributes:
        tokens: int32 [P] or [N, B].
        logprobs, top_ids, top_logprobs: of `tokens`.
        is_number: bool, False where logits are NaN or infinite.
        made: bool, whether the row made a token.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array
    is_number: jax.Array
    made: jax.Array
