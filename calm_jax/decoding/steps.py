"""The compiled steps of decoding: one prefill of a chunk of tokens, or many tokens a row.

Both take the whole state and return it; its arrays are donated, so there is one copy of it.

Axes: B row of the state, P row of a prefill, T position in a chunk, R slot that is read, D model
width, V vocabulary, N decoding step, k most probable tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax import sharding
from calm_jax.decoding.sampling import Choice, choose, log_probabilities, penalised
from calm_jax.models import Inputs

SCORED = 16  # positions whose logits are held at once; every chunk is a multiple of it


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


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "known", "read", "scored", "top"),
    donate_argnames=("state",),
)
def prefill(
    graphdef: nnx.GraphDef,
    weights: nnx.State,
    state: State,
    chunk: Chunk,
    ends_E: jax.Array,
    *,
    known: int,
    read: int,
    scored: bool,
    top: int,
) -> tuple[State, News, tuple[jax.Array, ...] | None]:
    """Reads a chunk; where it ends a prompt, chooses the first token of the answer.

    Args:
        ends_E: the ids that end an answer, int32 [E].
        known: ids from 0 that may be chosen.
        read: number of slots that are read, at least start + T.
        scored: whether log-probabilities of `next_PT` are asked for.
        top: number of most probable tokens that are told.

    Returns:
        the state; the first tokens; and of `next_PT` the log-probabilities, [P, T], and ids and
        log-probabilities of the most probable tokens, [P, T, k].
    """
    with _mesh_of(weights):
        return _prefill(
            nnx.merge(graphdef, weights), state, chunk, ends_E, known, read, scored, top
        )


def _prefill(model, state, chunk, ends_E, known, read, scored, top):
    rows_P, T = chunk.rows_P, chunk.tokens_PT.shape[1]
    length_B = state.cache.slots.length_B.at[rows_P].set(chunk.start_P, mode="drop")
    real_PT = (jnp.arange(T) < chunk.length_P[:, None]).astype(jnp.int32)
    index_PT = chunk.start_P[:, None] + jnp.arange(T)
    prompt_PT = jnp.where(index_PT < chunk.prompt_P[:, None], real_PT, 0)
    inputs = Inputs(chunk.tokens_PT, segments_BT=real_PT, prompt_mask_BT=prompt_PT, packed=False)
    cache = state.cache.with_length(length_B).using(rows_P, read)
    h_PTD, cache = model.residual(inputs, cache)
    last_P11 = jnp.maximum(chunk.length_P - 1, 0)[:, None, None]
    h_P1D = jnp.take_along_axis(h_PTD, last_P11, axis=1)
    logits_PV = model.logits(h_P1D)[:, 0, :known]
    place_P = jnp.zeros_like(rows_P)
    news = _news(logits_PV, chunk.choice, place_P, chunk.seen_PV, chunk.left_P > 0, top)

    goes_on_P = news.is_number & ~jnp.isin(news.tokens, ends_E)

    def put(x, new):
        return jax.tree.map(lambda x, new: x.at[rows_P].set(new, mode="drop"), x, new)

    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = put(seen_BV, chunk.seen_PV).at[rows_P, news.tokens].set(True, mode="drop")
    state = State(
        cache.using(),
        put(state.token_B, news.tokens),
        put(state.made_B, jnp.ones_like(rows_P)),
        put(state.left_B, jnp.where(goes_on_P, jnp.maximum(chunk.left_P - 1, 0), 0)),
        put(state.choice, chunk.choice),
        seen_BV,
    )
    scores = _scores(model, h_PTD, chunk.next_PT, known, top) if scored else None
    return _laid_out(state), news, scores


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "known", "read", "most", "top"),
    donate_argnames=("state",),
)
def decode(
    graphdef: nnx.GraphDef,
    weights: nnx.State,
    state: State,
    ends_E: jax.Array,
    steps: jax.Array,
    until_idle: jax.Array,
    *,
    known: int,
    read: int,
    most: int,
    top: int,
) -> tuple[State, News]:
    """Adds up to `steps` tokens to each row that is not idle.

    Args:
        steps: int32, at most `most`; read must cover every row's length plus it.
        until_idle: bool, whether to stop as soon as another row is idle.

    Returns:
        the state, and the tokens [N, B] of each step, N = `most`.
    """
    with _mesh_of(weights):
        return _decode(
            nnx.merge(graphdef, weights), state, ends_E, steps, until_idle, known, read, most, top
        )


def _decode(model, state, ends_E, steps, until_idle, known, read, most, top):
    active = jnp.sum(state.left_B > 0)

    def more(carry):
        step, state, _ = carry
        now = jnp.sum(state.left_B > 0)
        return (step < steps) & (now > 0) & ~(until_idle & (now < active))

    def add_token(carry):
        step, state, kept = carry
        active_B = state.left_B > 0
        inputs = Inputs(
            state.token_B[:, None],
            segments_BT=active_B[:, None].astype(jnp.int32),
            prompt_mask_BT=jnp.zeros_like(state.token_B)[:, None],
            packed=False,
        )
        h_B1D, cache = model.residual(inputs, state.cache.using(None, read))
        logits_BV = model.logits(h_B1D)[:, 0, :known]
        news = _news(logits_BV, state.choice, state.made_B, state.seen_BV, active_B, top)
        goes_on_B = active_B & news.is_number & ~jnp.isin(news.tokens, ends_E)
        seen_BV = state.seen_BV
        if seen_BV is not None:
            seen_BV = jax.vmap(lambda seen_V, token: seen_V.at[token].set(True))(
                seen_BV, news.tokens
            )
        state = State(
            cache.using(),
            jnp.where(active_B, news.tokens, state.token_B),
            state.made_B + active_B,
            jnp.where(goes_on_B, state.left_B - 1, 0),
            state.choice,
            seen_BV,
        )
        kept = jax.tree.map(lambda x, new: x.at[step].set(new), kept, news)
        return step + 1, state, kept

    B = len(state.token_B)
    kept = News(
        jnp.zeros((most, B), jnp.int32),
        jnp.zeros((most, B), jnp.float32),
        jnp.zeros((most, B, top), jnp.int32),
        jnp.zeros((most, B, top), jnp.float32),
        jnp.ones((most, B), bool),
        jnp.zeros((most, B), bool),
    )
    _, state, kept = jax.lax.while_loop(more, add_token, (jnp.int32(0), state, kept))
    return _laid_out(state), kept


@jax.jit
def begin(weights: nnx.State, cache: Any, choice: Choice) -> State:
    """The state in which all rows are idle, on the devices of the weights."""
    with _mesh_of(weights):
        zeros_B = jnp.zeros_like(cache.slots.length_B)
        return _laid_out(State(cache, zeros_B, zeros_B, zeros_B, choice))


def _mesh_of(weights: nnx.State):
    return sharding.mesh_of(jax.tree.leaves(weights)[0])


def _laid_out(state: State) -> State:
    """A state whose small arrays are laid out by the rules, so that every step takes the same."""
    small = dataclasses.replace(state, cache=state.cache.slots)
    small = jax.tree.map(lambda x: sharding.constrain(x, "batch", *[None] * (x.ndim - 1)), small)
    return dataclasses.replace(small, cache=state.cache)


@functools.partial(jax.jit, static_argnames=("count",), donate_argnames=("state",))
def copy_row(state: State, source: jax.Array, target: jax.Array, *, count: int) -> State:
    """Row `target` gets the first `count` cached tokens of row `source`."""
    return dataclasses.replace(state, cache=state.cache.with_copy(source, target, count))


@functools.partial(jax.jit, donate_argnames=("state",))
def clear_row(state: State, row: jax.Array) -> State:
    """The state with zeros in place of all that the caches hold of a row."""

    def cleared(x):
        return x.at[:, row].set(0) if x.ndim > 2 else x  # [L, B, ...], and [B, S] of slots

    return dataclasses.replace(state, cache=jax.tree.map(cleared, state.cache))


@functools.partial(jax.jit, donate_argnames=("state",))
def end_rows(state: State, ended_B: jax.Array) -> State:
    """Makes rows idle where bool [B] says so."""
    return dataclasses.replace(state, left_B=jnp.where(ended_B, 0, state.left_B))


def _news(
    logits_BV: jax.Array,
    choice: Choice,
    place_B: jax.Array,
    seen_BV: jax.Array | None,
    made_B: jax.Array,
    top: int,
) -> News:
    weighed_BV = logits_BV
    if seen_BV is not None:
        weighed_BV = penalised(logits_BV, seen_BV, choice.penalty_B)
    tokens_B = choose(weighed_BV, choice, place_B)
    logprobs = log_probabilities(logits_BV, tokens_B, top)
    is_number_B = jnp.all(jnp.isfinite(logits_BV), axis=1)
    return News(tokens_B, *logprobs, is_number_B, made_B)


def _scores(
    model: nnx.Module, h_PTD: jax.Array, next_PT: jax.Array, known: int, top: int
) -> tuple[jax.Array, ...]:
    """Log-probabilities of `next_PT`, some positions at a time: all logits would be much larger."""
    P, T = next_PT.shape

    def part(inputs):
        h_PSD, next_PS = inputs
        logits_XV = model.logits(h_PSD)[..., :known].reshape(P * SCORED, known)
        found = log_probabilities(logits_XV, next_PS.reshape(-1), top)
        return tuple(x.reshape(P, SCORED, *x.shape[1:]) for x in found)

    def in_parts(x):
        return jnp.moveaxis(x.reshape(P, T // SCORED, SCORED, *x.shape[2:]), 1, 0)

    found = jax.lax.map(part, (in_parts(h_PTD), in_parts(next_PT)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(P, T, *x.shape[3:]) for x in found)
