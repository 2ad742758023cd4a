"""The compiled steps of decoding: one prefill of a chunk, or many tokens for each row.

They take the whole state and return it; its arrays are donated, so there is only one copy.

Axes: B row of the state, P row of a prefill, T position in a chunk, S position of an augment's own
inputs, R slot that is read, D model width, V vocabulary, N decoding step, k most probable tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax import sharding
from calm_jax.decoding.rounds import chosen_tokens, drafted_round, token_round
from calm_jax.decoding.sampling import Choice, log_probabilities
from calm_jax.decoding.state import Chunk, News, OwnChunk, State
from calm_jax.models import Inputs

SCORED = 16  # most positions whose logits are held at once; a longer chunk is a multiple of it


class Static:
    """A model's structure. Its hash, which takes milliseconds, is computed once for all steps."""

    def __init__(self, graphdef: nnx.GraphDef):
        self.graphdef, self._hash = graphdef, hash(graphdef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Static) and self.graphdef == other.graphdef


@functools.partial(
    jax.jit,
    static_argnames=("static", "known", "reads", "scored", "top"),
    donate_argnames=("state",),
)
def prefill(
    static: Static,
    weights: nnx.State,
    state: State,
    chunk: Chunk,
    ends_E: jax.Array,
    *,
    known: int,
    reads: tuple,
    scored: bool,
    top: int,
) -> tuple[State, News, tuple[jax.Array, ...] | None]:
    """Reads a chunk; if it ends a prompt, chooses the first token of the answer.

    Args:
        ends_E: the ids that end an answer, int32 [E].
        known: only ids below it may be chosen.
        reads: number of slots that are read, at least start + T; and of a model with augments that
            have inputs of their own a tuple of the number of each one's slots, which all hold what
            these tokens may see, None for other augments.
        scored: whether log-probabilities of `next_PT` are needed.
        top: number of most probable tokens to return.

    Returns:
        the state; the first tokens; and the log-probabilities of `next_PT`, [P, T], with ids and
        log-probabilities of the most probable tokens, [P, T, k].
    """
    with _mesh_of(weights):
        model = nnx.merge(static.graphdef, weights)
        return _prefill(model, state, chunk, ends_E, known, reads, scored, top)


def _prefill(model, state, chunk, ends_E, known, reads, scored, top):
    rows_P, T = chunk.rows_P, chunk.tokens_PT.shape[1]
    length_B = state.cache.slots.length_B.at[rows_P].set(chunk.start_P, mode="drop")
    real_PT = (jnp.arange(T) < chunk.length_P[:, None]).astype(jnp.int32)
    index_PT = chunk.start_P[:, None] + jnp.arange(T)
    prompt_PT = jnp.where(index_PT < chunk.prompt_P[:, None], real_PT, 0)
    inputs = Inputs(chunk.tokens_PT, segments_BT=real_PT, prompt_mask_BT=prompt_PT, packed=False)
    # Where there is a place for every row, each is at its own: nothing needs to be gathered.
    rows = None if len(rows_P) == len(length_B) else rows_P
    cache = state.cache.with_length(length_B).using(rows, *reads)
    h_PTD, cache = model.residual(inputs, cache)
    last_P11 = jnp.maximum(chunk.length_P - 1, 0)[:, None, None]
    h_P1D = jnp.take_along_axis(h_PTD, last_P11, axis=1)
    logits_PV = model.logits(h_P1D)[:, 0, :known]
    place_P = jnp.zeros_like(rows_P)
    news = chosen_tokens(logits_PV, chunk.choice, place_P, chunk.seen_PV, chunk.left_P > 0, top)

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
    found = scores(model, h_PTD, chunk.next_PT, known, top) if scored else None
    return _laid_out(state), news, found


@functools.partial(
    jax.jit,
    static_argnames=("static", "known", "reads", "most", "top", "draft"),
    donate_argnames=("state",),
)
def decode(
    static: Static,
    weights: nnx.State,
    state: State,
    ends_E: jax.Array,
    rounds: jax.Array,
    until_idle: jax.Array,
    *,
    known: int,
    reads: tuple,
    most: int,
    top: int,
    draft: int = 0,
) -> tuple[State, News, jax.Array]:
    """Runs up to `rounds` rounds; each adds one token or more to each row that is not idle.

    Args:
        rounds: int32, at most `most`.
        until_idle: bool, whether to stop as soon as another row is idle.
        reads: as for `prefill`; they must cover every row's length and the tokens that the rounds
            can make. An augment that reads the answer needs one round a dispatch.
        draft: number of tokens that the augment drafts in each round.

    Returns:
        the state; the tokens [N, B] of each step, N = `most` · (`draft` + 1); and int32 [2], the
        numbers of drafted tokens that were compared and that were accepted.
    """
    with _mesh_of(weights):
        model = nnx.merge(static.graphdef, weights)
        add = (
            functools.partial(drafted_round, model, draft)
            if draft
            else functools.partial(token_round, model)
        )
        add = functools.partial(add, ends_E=ends_E, known=known, reads=reads, top=top)
        return _decode(add, state, rounds, until_idle, most, draft + 1, top)


def _decode(add, state, rounds, until_idle, most, places, top):
    active = jnp.sum(state.left_B > 0)

    def more(carry):
        number, state, _, _ = carry
        now = jnp.sum(state.left_B > 0)
        return (number < rounds) & (now > 0) & ~(until_idle & (now < active))

    def round_(carry):
        number, state, kept, counts = carry
        state, news, found = add(state)
        kept = jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, number * places, 0),
            kept,
            news,
        )
        return number + 1, state, kept, counts + found

    N, B = most * places, len(state.token_B)
    kept = News(
        jnp.zeros((N, B), jnp.int32),
        jnp.zeros((N, B), jnp.float32),
        jnp.zeros((N, B, top), jnp.int32),
        jnp.zeros((N, B, top), jnp.float32),
        jnp.ones((N, B), bool),
        jnp.zeros((N, B), bool),
    )
    carry = (jnp.int32(0), state, kept, jnp.zeros(2, jnp.int32))
    _, state, kept, counts = jax.lax.while_loop(more, round_, carry)
    return _laid_out(state), kept, counts


# The weights are kept, which bind the state to their devices as every step does: to an unbound
# state the first step would be compiled twice.
@functools.partial(jax.jit, keep_unused=True)
def begin(weights: nnx.State, cache: Any, choice: Choice) -> State:
    """The state in which all rows are idle, on the devices of the weights."""
    with _mesh_of(weights):
        zeros_B = jnp.zeros_like(cache.slots.length_B)
        return _laid_out(State(cache, zeros_B, zeros_B, zeros_B, choice))


def _mesh_of(weights: nnx.State):
    return sharding.mesh_of(jax.tree.leaves(weights)[0])


def _laid_out(state: State) -> State:
    """A state with small arrays sharded by the rules, so that all steps take equal shardings."""
    small = dataclasses.replace(state, cache=state.cache.slots)
    small = jax.tree.map(lambda x: sharding.constrain(x, "batch", *[None] * (x.ndim - 1)), small)
    return dataclasses.replace(small, cache=state.cache)


@functools.partial(
    jax.jit, static_argnames=("static", "number", "read"), donate_argnames=("state",)
)
def read_own(
    static: Static,
    weights: nnx.State,
    state: State,
    chunk: OwnChunk,
    *,
    number: int,
    read: int,
) -> State:
    """Augment `number` reads inputs of its own; `read` slots cover these."""
    with _mesh_of(weights):
        model, cache = nnx.merge(static.graphdef, weights), state.cache
        real_PS = jnp.arange(chunk.order_PS.shape[1]) < chunk.length_P[:, None]
        prompt_PS = real_PS & (chunk.order_PS < chunk.prompt_P[:, None])
        own = Inputs(
            chunk.tokens_PS,
            chunk.features_PSF,
            segments_BT=real_PS.astype(jnp.int32),
            order_BT=chunk.order_PS,
            prompt_mask_BT=prompt_PS.astype(jnp.int32),
            packed=False,
        )
        rows = None if len(chunk.rows_P) == len(cache.slots.length_B) else chunk.rows_P
        cache = model.read_own(number, own, cache.own_using(number, rows, read))
        return _laid_out(dataclasses.replace(state, cache=cache.own_using(number)))


@functools.partial(jax.jit, donate_argnames=("state",))
def keep_own(state: State, row: jax.Array, kept: tuple[jax.Array | None, ...]) -> State:
    """A row keeps the first `kept` inputs of each augment with inputs of its own."""
    return dataclasses.replace(state, cache=state.cache.own_kept(row, kept))


def grow_own(state: State, number: int, slots: int) -> State:
    """The state with `slots` slots for the inputs of its own of augment `number`.

    Only what grows is compiled: a donated array cannot become a larger one.
    """
    return dataclasses.replace(state, cache=state.cache.own_grown(number, slots))


@functools.partial(jax.jit, static_argnames="counts", donate_argnames=("state",))
def copy_row(state: State, source: jax.Array, target: jax.Array, *, counts: tuple) -> State:
    """Row `target` gets the first slots of row `source`; `counts` are as `reads` of `prefill`."""
    return dataclasses.replace(state, cache=state.cache.with_copy(source, target, *counts))


@functools.partial(jax.jit, donate_argnames=("state",))
def clear_row(state: State, row: jax.Array) -> State:
    """The state with zeros in all caches of one row."""

    def cleared(x):
        return x.at[:, row].set(0) if x.ndim > 2 else x  # [L, B, ...], and [B, S] of slots

    return dataclasses.replace(state, cache=jax.tree.map(cleared, state.cache))


@functools.partial(jax.jit, donate_argnames=("state",))
def end_rows(state: State, ended_B: jax.Array) -> State:
    """Makes rows idle where bool [B] says so."""
    return dataclasses.replace(state, left_B=jnp.where(ended_B, 0, state.left_B))


def scores(
    model: nnx.Module, h_PTD: jax.Array, next_PT: jax.Array, known: int, top: int
) -> tuple[jax.Array, ...]:
    """Log-probabilities of `next_PT`, a few positions at a time: all logits take much memory."""
    P, T = next_PT.shape
    S = min(T, SCORED)

    def part(inputs):
        h_PSD, next_PS = inputs
        logits_XV = model.logits(h_PSD)[..., :known].reshape(P * S, known)
        found = log_probabilities(logits_XV, next_PS.reshape(-1), top)
        return tuple(x.reshape(P, S, *x.shape[1:]) for x in found)

    def in_parts(x):
        return jnp.moveaxis(x.reshape(P, T // S, S, *x.shape[2:]), 1, 0)

    found = jax.lax.map(part, (in_parts(h_PTD), in_parts(next_PT)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(P, T, *x.shape[3:]) for x in found)
