"""Greedy decoding of a padded batch; every step is a full forward pass.

Axes: B batch, T position, D model width, V vocabulary, N new tokens, E end tokens.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm_jax import sharding
from calm_jax.data.vocabulary import check_ids
from calm_jax.errors import CalmError
from calm_jax.models import ComposedDecoder, Decoder, Inputs
from calm_jax.models.calling import on_devices_of

LENGTH_BUCKET = 16  # prompts are padded to a multiple of it, so that few lengths are compiled


def generate(
    model: Decoder | ComposedDecoder,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
) -> np.ndarray:
    """Continues each prompt with the most probable next token, one token at a time.

    Args:
        prompts: texts, which `model.vocabulary.encode_sequence` encodes; or token ids, used as
            they are.
        max_new_tokens: number of tokens generated for each prompt.
        eos_id: the token that ends a row; default: any of the vocabulary's `eos_ids`.

    Returns:
        int32 [B, max_new_tokens]; after its end token a row is filled with `eos_id`.

    Raises:
        CalmError: a single text instead of a list, text without a vocabulary, an empty prompt, an
            id outside an embedding, or `max_new_tokens` below 1.

    >>> from flax import nnx
    >>> from calm_jax import Decoder, DecoderConfig, generate
    >>> config = DecoderConfig.palm(vocab_size=32, embed_dim=16, num_layers=2, num_heads=2,
    ...                             head_dim=8, mlp_dim=32)
    >>> generate(Decoder(config, nnx.Rngs(0)), [[1, 2, 3], [4]], max_new_tokens=5).shape
    (2, 5)
    """
    if max_new_tokens < 1:
        raise CalmError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if isinstance(prompts, str):
        raise CalmError(f"prompts is the text {prompts!r}; give a list of prompts")
    if len(prompts) == 0:
        return np.zeros((0, max_new_tokens), np.int32)
    ids = [_encode(model, prompt) for prompt in prompts]
    eos_ids = () if eos_id is None else (eos_id,)
    if eos_id is None and model.vocabulary is not None:
        eos_ids = model.vocabulary.eos_ids
    lengths_B = np.array([len(row) for row in ids], np.int32)
    longest = -(-lengths_B.max() // LENGTH_BUCKET) * LENGTH_BUCKET
    tokens_BT = np.zeros((len(ids), longest + max_new_tokens), np.int32)
    for row, prompt in zip(tokens_BT, ids, strict=True):
        row[: len(prompt)] = prompt
    with on_devices_of(model):
        graphdef, state = nnx.split(model)
        new_BN = _greedy(
            graphdef, max_new_tokens, eos_ids, known_ids(model), state, tokens_BT, lengths_B
        )
    return sharding.on_host(new_BN)


def known_ids(model: Decoder | ComposedDecoder) -> int:
    """The number of ids, from 0, that are tokens and have a row in every model's embedding."""
    rows = min(part.config.vocab_size for part in model.models)
    return rows if model.vocabulary is None else min(rows, model.vocabulary.size)


def _encode(model: Decoder | ComposedDecoder, prompt: str | Sequence[int]) -> list[int]:
    if isinstance(prompt, str):
        if model.vocabulary is None:
            raise CalmError(f"the model has no vocabulary to encode {prompt!r}; give token ids")
        ids = model.vocabulary.encode_sequence(prompt)
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise CalmError("an empty prompt has no next token; give at least one id")
    rows = min(part.config.vocab_size for part in model.models)
    check_ids(ids, rows, "prompt", model.vocabulary)
    return ids


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _greedy(graphdef, max_new_tokens: int, eos_ids, known: int, state, tokens_BT, prompt_lengths_B):
    """int32 [B, N], ids below `known`. Any of `eos_ids` ends a row; the first one fills it."""
    fill = eos_ids[0] if eos_ids else 0  # unused without end tokens, since no row ends
    model = nnx.merge(graphdef, state)
    ends_E = jnp.array(eos_ids, jnp.int32)
    index_T = jnp.arange(tokens_BT.shape[1])
    rows_B = jnp.arange(tokens_BT.shape[0])
    prompt_mask_BT = (index_T < prompt_lengths_B[:, None]).astype(jnp.int32)

    def more(carry):
        step, _, ended_B = carry
        return (step < max_new_tokens) & ~jnp.all(ended_B)

    def add_token(carry):
        step, tokens_BT, ended_B = carry
        lengths_B = prompt_lengths_B + step
        inputs = Inputs(
            tokens_BT,
            segments_BT=(index_T < lengths_B[:, None]).astype(jnp.int32),
            prompt_mask_BT=prompt_mask_BT,
            packed=False,
        )
        h_BTD, _ = model.residual(inputs)
        last_B1D = jnp.take_along_axis(h_BTD, (lengths_B - 1)[:, None, None], axis=1)
        logits_BV = model.logits(last_B1D)[:, 0, :known]
        next_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        next_B = jnp.where(ended_B, fill, next_B)
        tokens_BT = tokens_BT.at[rows_B, lengths_B].set(next_B)
        return step + 1, tokens_BT, ended_B | jnp.isin(next_B, ends_E)

    start = (0, jnp.asarray(tokens_BT), jnp.zeros(tokens_BT.shape[0], bool))
    steps, tokens_BT, _ = jax.lax.while_loop(more, add_token, start)
    new_N = jnp.arange(max_new_tokens)
    new_BN = jnp.take_along_axis(tokens_BT, prompt_lengths_B[:, None] + new_N, axis=1)
    return jnp.where(new_N < steps, new_BN, fill)
