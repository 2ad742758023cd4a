"""The state of decoding on the devices, the input of a step, and its news.

Axes: B row of the state, P row of a prefill, T position in a chunk, S and F position and feature of
an augment's own inputs, V vocabulary, N decoding step, k most probable tokens.
"""

import dataclasses
from typing import Any

import jax

from calm_jax.decoding.sampling import Choice


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All state of decoding on the devices.

    Attributes:
        cache: the model's cache, with B rows.
        token_B: int32 [B], the last token of each row, which is not in the cache yet.
        made_B: int32 [B], number of tokens in the row's answer.
        left_B: int32 [B], most tokens that the answer may still get; 0: the row is idle.
        choice: the sampling options of each row.
        seen_BV: bool [B, V], which tokens a row has; None while no row has a penalty.
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
    """Tokens of some prompts.

    Attributes:
        tokens_PT: int32 [P, T].
        next_PT: int32 [P, T], the token after each, whose log-probability is returned.
        length_P: int32 [P], number of tokens that are not padding.
        rows_P: int32 [P], rows of the state; B or more: no row.
        start_P: int32 [P], number of the row's tokens that stay in the cache.
        prompt_P: int32 [P], number of the row's tokens that are a prompt.
        left_P: int32 [P], longest answer; 0: the prompt continues, or is only scored.
        choice: the sampling options, [P].
        seen_PV: bool [P, V], which tokens the whole prompt has; None as in the state.
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
class OwnChunk:
    """Inputs of an augment's own, which follow those that rows hold.

    Attributes:
        tokens_PS: int32 [P, S]; None for features.
        features_PSF: float32 [P, S, F]; None for tokens.
        order_PS: int32 [P, S], the index of the first of the row's tokens that may see each.
        length_P: int32 [P], number of inputs that are not padding.
        rows_P: int32 [P], rows of the state; B or more: no row.
        prompt_P: int32 [P], number of the row's tokens that are a prompt.
    """

    tokens_PS: Any
    features_PSF: Any
    order_PS: Any
    length_P: Any
    rows_P: Any
    prompt_P: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class News:
    """The results of a step: tokens, and the `top` most probable tokens along a last axis.

    Attributes:
        tokens: int32 [P] or [N, B].
        logprobs, top_ids, top_logprobs: of `tokens`.
        is_number: bool, False if logits are NaN or infinite.
        made: bool, whether the row made a token.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array
    is_number: jax.Array
    made: jax.Array
