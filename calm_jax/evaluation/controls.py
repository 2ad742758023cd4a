"""Controls: a trained pair whose augment's information is destroyed, but not its form.

What is left of the gain under a control was never the augment's.

Axes: B row, T position, E augment width.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm_jax import sharding
from calm_jax.data import own_tokens
from calm_jax.decoding import Completion, Sampling, Score
from calm_jax.decoding.completion import WrittenAnswer
from calm_jax.decoding.prepared import known_ids
from calm_jax.decoding.requests import News
from calm_jax.decoding.steps import scores
from calm_jax.errors import CalmError
from calm_jax.models import ComposedDecoder, Inputs
from calm_jax.models.calling import on_devices_of
from calm_jax.models.origin import Origin
from calm_jax.models.own_inputs import why_own
from calm_jax.models.taps import Perturb, item_shape

SEED = 0
_LENGTH = 32  # lengths of rows are rounded up to a multiple of it, so that few are compiled


def shuffled(x_BTE: jax.Array, augment: int, layer: int) -> jax.Array:
    """Each row's taps are those of a row half a batch away; neighbours may share a prompt."""
    return jnp.roll(x_BTE, max(1, len(x_BTE) // 2), axis=0)


def zeroed(x_BTE: jax.Array, augment: int, layer: int) -> jax.Array:
    return jnp.zeros_like(x_BTE)


def noise(x_BTE: jax.Array, augment: int, layer: int) -> jax.Array:
    """Each tap is a random vector of the same norm."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), augment), layer)
    drawn_TE = jax.random.normal(key, x_BTE.shape[1:], jnp.float32)  # the same for every row
    norm_BT1 = jnp.linalg.norm(x_BTE.astype(jnp.float32), axis=-1, keepdims=True)
    drawn_TE /= jnp.linalg.norm(drawn_TE, axis=-1, keepdims=True)
    return (drawn_TE * norm_BT1).astype(x_BTE.dtype)


# Controls that change the taps, and the one that changes the augments themselves.
OF_TAPS: dict[str, Perturb] = {"shuffled": shuffled, "zeroed": zeroed, "noise": noise}
PERMUTED = "permuted"
CONTROLS = (*OF_TAPS, PERMUTED)


def permute_augments(model: ComposedDecoder) -> None:
    """Shuffles the entries of every array of the augments in place; a stack is one array."""
    key = jax.random.key(SEED)
    for number, augment in enumerate(model.augments):
        graphdef, state = nnx.split(augment)
        leaves, tree = jax.tree.flatten(state)
        keys = jax.random.split(jax.random.fold_in(key, number), len(leaves))
        leaves = [_permuted(*pair) for pair in zip(keys, leaves, strict=True)]
        permuted = nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))
        permuted.origin = Origin(augment.vocabulary)
        model.augments[number] = permuted


@jax.jit
def _permuted(key: jax.Array, x: jax.Array) -> jax.Array:
    return jax.random.permutation(key, x.reshape(-1), independent=True).reshape(x.shape)


class Recomputed:
    """Answers as a `Generator` does, greedily and without caches, with changed taps.

    The taps of all rows of a batch must be known at once, so every new token computes the whole
    batch anew.

    Args:
        control: a name of `OF_TAPS`.
        slots: rows of a batch at most.

    Raises:
        CalmError: an augment reads features.
    """

    def __init__(self, model: ComposedDecoder, control: str, *, slots: int):
        for number, augment in enumerate(model.augments):
            if item_shape(augment) is not None:
                raise CalmError(
                    f"augment {number} {why_own(augment)[0]}, which --control={control} does not "
                    "support"
                )
        self._alignments = own_tokens.alignments_of(model)
        self.vocabulary, self.slots = model.vocabulary, slots
        self._model, self._control, self._perturb = model, control, OF_TAPS[control]
        self._known = known_ids(model)

    def as_completed(
        self, prompts: Sequence[list[int]], sampling: Sampling | Sequence[Sampling]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The index of each prompt of ids and its answer, in any order.

        Raises:
            CalmError: a temperature, several answers, or a single prompt to shuffle.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if any(one.temperature or one.n > 1 for one in each):
            raise CalmError(f"--control={self._control} answers greedily, once; no --temperature")
        new = max((one.max_new_tokens for one in each), default=0)
        for batch in self._batches(prompts):
            tokens_BT, asked_B = _padded([prompts[number] for number in batch], new)
            length_B = asked_B
            # What an augment reads in tokens of its own is made anew for each token.
            for count in [1] * new if self._alignments else [new]:
                tokens_BT = self._call(_answered, tokens_BT, length_B, asked_B, new=count)
                length_B = length_B + count
            for number, row_T, length in zip(batch, tokens_BT, asked_B, strict=True):
                made = row_T[length : length + each[number].max_new_tokens].tolist()
                yield number, [self._completion(prompts[number], made, each[number].stop)]

    def score(
        self, prompts: Sequence[list[int]], continuations: Sequence[list[int]]
    ) -> list[Score]:
        """As `Generator.score`, of ids."""
        whole = [[*a, *b] for a, b in zip(prompts, continuations, strict=True)]
        found: list[Score] = [None] * len(whole)
        for batch in self._batches(whole):
            tokens_BT, length_B = _padded([whole[number] for number in batch], 0)
            asked_B = np.array([len(prompts[number]) for number in batch], np.int32)
            logprob_BT, best_BT = self._call(_scored, tokens_BT, length_B, asked_B)
            for row, number in enumerate(batch):
                places = slice(asked_B[row] - 1, length_B[row] - 1)
                each = logprob_BT[row, places].tolist()
                if np.isnan(each).any():
                    raise CalmError(f"prompt {number}: the logits of its continuation are NaN")
                greedy = bool(np.all(best_BT[row, places] == continuations[number]))
                found[number] = Score(sum(each), each, greedy)
        return found

    def _batches(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The numbers of the rows of each batch: rows of similar length, otherwise at random."""
        if not rows:
            return []
        if len(rows) == 1 and self._control == "shuffled":
            raise CalmError("--control=shuffled needs at least two prompts")
        order = np.random.default_rng(SEED).permutation(len(rows))
        lengths = np.array([len(rows[number]) for number in order])
        order = order[np.argsort(lengths, kind="stable")]
        # Batches of nearly one size; two rows at least, since one cannot be shuffled.
        count = min(-(-len(order) // self.slots), max(1, len(order) // 2))
        return np.array_split(order, count)

    def _call(self, function: Callable, tokens_BT, length_B, asked_B, **arguments):
        with on_devices_of(self._model):
            graphdef, weights = nnx.split(self._model)
            result = function(
                graphdef,
                weights,
                tokens_BT,
                length_B,
                asked_B,
                self._own(tokens_BT, length_B, asked_B),
                perturb=self._perturb,
                known=self._known,
                **arguments,
            )
        return jax.tree.map(sharding.on_host, result)

    def _own(self, tokens_BT, length_B, asked_B) -> dict[str, np.ndarray]:
        rows = [row[:length].tolist() for row, length in zip(tokens_BT, length_B, strict=True)]
        arrays = {}
        for number, alignment in self._alignments.items():
            aligned = alignment.align(rows, asked_B.tolist(), check=True)
            length = _rounded(max(len(row.ids) for row in aligned))
            arrays |= own_tokens.own_arrays(number, aligned, asked_B.tolist(), length)
        return arrays

    def _completion(
        self, prompt: list[int], tokens: list[int], stop: tuple[str, ...]
    ) -> Completion:
        """The answer up to its end token or a stop text."""
        answer = WrittenAnswer(self.vocabulary, prompt, stop)
        ends = () if self.vocabulary is None else self.vocabulary.eos_ids
        for token in tokens:
            answer.add(News(0, [token], [], "stop" if token in ends else None))
        answer.add(News(0, [], [], "length"))
        return answer.completion(with_logprobs=False)


def _padded(rows: Sequence[Sequence[int]], new: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows as one array with room for `new` tokens, and their lengths."""
    length_B = np.array(list(map(len, rows)), np.int32)
    return own_tokens.padded(rows, _rounded(int(length_B.max()) + new)), length_B


def _rounded(length: int) -> int:
    return -(-length // _LENGTH) * _LENGTH


def _stream(
    model: ComposedDecoder,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    asked_B: jax.Array,
    own: Mapping[str, jax.Array],
    perturb: Perturb,
) -> jax.Array:
    """The residual stream [B, T, D] under a control; `asked_B` are the lengths of the prompts."""
    place_T = jnp.arange(tokens_BT.shape[1])
    real_BT, prompt_BT = ((place_T < x[:, None]).astype(jnp.int32) for x in (length_B, asked_B))
    inputs = Inputs(
        tokens_BT,
        segments_BT=real_BT,
        prompt_mask_BT=prompt_BT,
        packed=False,
        augments=Inputs.augments_of(own),
    )
    return model.perturbed(inputs, perturb)[0]


@functools.partial(jax.jit, static_argnames=("graphdef", "perturb", "known", "new"))
def _answered(
    graphdef, weights, tokens_BT, length_B, asked_B, own, *, perturb, known, new
) -> jax.Array:
    """The tokens with `new` more of each row, each the most probable one."""
    model = nnx.merge(graphdef, weights)

    def add(made, tokens_BT):
        end_B = length_B + made
        x_BTD = _stream(model, tokens_BT, end_B, asked_B, own, perturb)
        x_B1D = jnp.take_along_axis(x_BTD, (end_B - 1)[:, None, None], axis=1)
        token_B = jnp.argmax(model.logits(x_B1D)[:, 0, :known], axis=-1)
        return tokens_BT.at[jnp.arange(len(end_B)), end_B].set(token_B.astype(jnp.int32))

    return jax.lax.fori_loop(0, new, add, tokens_BT)


@functools.partial(jax.jit, static_argnames=("graphdef", "perturb", "known"))
def _scored(graphdef, weights, tokens_BT, length_B, asked_B, own, *, perturb, known):
    """Of each position, the log-probability of the next token, and the most probable one."""
    model = nnx.merge(graphdef, weights)
    x_BTD = _stream(model, tokens_BT, length_B, asked_B, own, perturb)
    logprob_BT, best_BT1, _ = scores(model, x_BTD, jnp.roll(tokens_BT, -1, axis=1), known, 1)
    return logprob_BT, best_BT1[..., 0]
