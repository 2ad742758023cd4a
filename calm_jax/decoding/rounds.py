"""One round of decoding: it adds a token to each row, or accepted drafted tokens and one more.

In a drafted round an augment writes a few tokens alone, one after another, which costs little: the
layers below its taps must read them anyway. The composed model then reads all of them in one pass,
and its own choice at each position says how many are accepted. Both choose by the same random
numbers (arXiv 2408.07978), so the answer is token for token that without drafts, sampled or not.

Axes: B row, T position in a round, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax.decoding.sampling import Choice, choose, log_probabilities, penalised
from calm_jax.decoding.state import News, State
from calm_jax.models import ComposedDecoder, Inputs

DRAFTER = 0  # number of the augment that drafts


def token_round(
    model: Any, state: State, ends_E: jax.Array, known: int, reads: tuple, top: int
) -> tuple[State, News, jax.Array]:
    """Adds a token to each row that is not idle.

    The last arguments are those of `steps.prefill`; `reads` are the last ones of the cache's
    `using`.

    Returns:
        the state; the tokens, [1, B]; and zeros, int32 [2]: there are no drafts.
    """
    active_B = state.left_B > 0
    inputs = _inputs(state.token_B[:, None], active_B)
    h_B1D, cache = model.residual(inputs, state.cache.using(None, *reads))
    logits_B1V = model.logits(h_B1D)[:, :, :known]
    drafted_B0 = jnp.zeros((len(active_B), 0), jnp.int32)
    return _answered(state, cache, logits_B1V, active_B, ends_E, top, drafted_B0)


def drafted_round(
    model: ComposedDecoder,
    draft: int,
    state: State,
    ends_E: jax.Array,
    known: int,
    reads: tuple,
    top: int,
) -> tuple[State, News, jax.Array]:
    """Adds 1 to `draft` + 1 tokens to each row that is not idle.

    Args:
        reads: as in `token_round`; at least `draft` + 1 more than the tokens of a row.

    Returns:
        the state; the tokens, [`draft` + 1, B]; and int32 [2], the numbers of drafted tokens that
        were compared and that were accepted.
    """
    active_B = state.left_B > 0
    augment, layers = model.augments[DRAFTER], model.plan.tap_layers[DRAFTER]

    def draft_token(carry, place):
        token_B, cache, seen_BV = carry
        inputs = _inputs(token_B[:, None], active_B)
        taps, h_B1E, cache = augment.taps_and_residual(inputs, layers, cache)

        def next_token():
            logits_BV = augment.logits(h_B1E)[:, 0, :known]
            return _choose(logits_BV, state.choice, state.made_B + place, seen_BV)

        # The token after the last drafted one is not needed.
        next_B = jax.lax.cond(place < draft, next_token, lambda: token_B)
        return (next_B, cache, _with(seen_BV, next_B)), (token_B, taps)

    cache = state.cache.using(None, *reads)
    carry = (state.token_B, cache.augments[DRAFTER], state.seen_BV)
    (_, of_augment, _), (tokens_TB, taps) = jax.lax.scan(draft_token, carry, jnp.arange(draft + 1))
    augments = list(cache.augments)
    augments[DRAFTER] = of_augment
    cache = dataclasses.replace(cache, augments=tuple(augments))
    tokens_BT = tokens_TB.T
    taps = jax.tree.map(lambda x: jnp.moveaxis(x[..., 0, :], 0, -2), taps)  # [T, ..., B, 1, E]
    h_BTD, cache = model.residual(_inputs(tokens_BT, active_B), cache, {DRAFTER: taps})
    logits_BTV = model.logits(h_BTD)[:, :, :known]
    return _answered(state, cache, logits_BTV, active_B, ends_E, top, tokens_BT[:, 1:])


def chosen_tokens(
    logits_BV: jax.Array,
    choice: Choice,
    place_B: jax.Array,
    seen_BV: jax.Array | None,
    made_B: jax.Array,
    top: int,
) -> News:
    """The token that each row [B] chooses from logits, if `made_B`; `place_B` is its number."""
    tokens_B = _choose(logits_BV, choice, place_B, seen_BV)
    logprobs = log_probabilities(logits_BV, tokens_B, top)
    is_number_B = jnp.all(jnp.isfinite(logits_BV), axis=1)
    return News(tokens_B, *logprobs, is_number_B, made_B)


def _answered(
    state: State,
    cache: Any,
    logits_BTV: jax.Array,
    active_B: jax.Array,
    ends_E: jax.Array,
    top: int,
    drafted_BT: jax.Array,
) -> tuple[State, News, jax.Array]:
    """Chooses a token at each position, as long as the draft agreed at the position before."""
    T = logits_BTV.shape[1]
    # -1 is no token's id: nothing was drafted after the last position.
    drafted_BT = jnp.pad(drafted_BT, ((0, 0), (0, 1)), constant_values=-1)

    def place(carry, inputs):
        state, goes_on_B, counts = carry
        logits_BV, drafted_B = inputs
        news = chosen_tokens(logits_BV, state.choice, state.made_B, state.seen_BV, goes_on_B, top)
        answers_B = goes_on_B & news.is_number & ~jnp.isin(news.tokens, ends_E)
        left_B = jnp.where(answers_B, state.left_B - 1, 0)
        state = dataclasses.replace(
            state,
            token_B=jnp.where(goes_on_B, news.tokens, state.token_B),
            made_B=state.made_B + goes_on_B,
            left_B=jnp.where(goes_on_B, left_B, state.left_B),
            seen_BV=_with(state.seen_BV, jnp.where(goes_on_B, news.tokens, state.token_B)),
        )
        right_B = goes_on_B & (news.tokens == drafted_B)
        compared_B = goes_on_B & (drafted_B >= 0)
        counts += jnp.stack([jnp.sum(compared_B), jnp.sum(right_B)])
        return (state, right_B & (left_B > 0), counts), news

    made_B = state.made_B
    # The cache stays outside the loop, which would copy it.
    carry = (dataclasses.replace(state, cache=None), active_B, jnp.zeros(2, jnp.int32))
    inputs = (jnp.moveaxis(logits_BTV, 1, 0), drafted_BT.T)
    (after, _, counts), news = jax.lax.scan(place, carry, inputs)
    if T > 1:  # removes tokens that were read but not accepted
        cache = cache.with_length(state.cache.slots.length_B + after.made_B - made_B)
    return dataclasses.replace(after, cache=cache.using()), news, counts


def _inputs(tokens_BT: jax.Array, active_B: jax.Array) -> Inputs:
    segments_BT = jnp.broadcast_to(active_B[:, None], tokens_BT.shape).astype(jnp.int32)
    return Inputs(
        tokens_BT,
        segments_BT=segments_BT,
        prompt_mask_BT=jnp.zeros_like(tokens_BT),
        packed=False,
    )


def _choose(
    logits_BV: jax.Array, choice: Choice, place_B: jax.Array, seen_BV: jax.Array | None
) -> jax.Array:
    if seen_BV is not None:
        logits_BV = penalised(logits_BV, seen_BV, choice.penalty_B)
    return choose(logits_BV, choice, place_B)


def _with(seen_BV: jax.Array | None, tokens_B: jax.Array) -> jax.Array | None:
    if seen_BV is None:
        return None
    return jax.vmap(lambda seen_V, token: seen_V.at[token].set(True))(seen_BV, tokens_B)
