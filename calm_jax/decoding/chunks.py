"""Chunks of prompts, which the host makes for a prefill, and their lengths."""

from collections.abc import Sequence

import numpy as np

from calm_jax.decoding.requests import Answer
from calm_jax.decoding.sampling import Choice, Sampling
from calm_jax.decoding.state import Chunk


def buckets(most: int, least: int) -> list[int]:
    """Lengths of compiled programs: powers of two, the numbers halfway between, and `most`."""
    sizes = [least]
    while sizes[-1] < most:
        power = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(power * 3 // 2 if sizes[-1] == power and power >= 32 else power * 2)
    return [*sizes[:-1], most]


def bucket(sizes: Sequence[int], least: int) -> int:
    """The first of ascending `sizes` that is at least `least`; the last one if none is."""
    return next((size for size in sizes if size >= least), sizes[-1])


def chunk_of(
    answers: Sequence[Answer],
    rows: Sequence[int],
    places: Sequence[int],
    *,
    count: int,
    tokens: int,
    no_row: int,
    known: int | None,
) -> Chunk:
    """The next tokens of the prompt of each answer, in NumPy arrays.

    Args:
        rows: the number of each answer's row.
        places: the place of each answer in the chunk.
        count: P, number of places; those without an answer get the row `no_row`.
        tokens: T, most tokens of a prompt.
        known: ids below it are marked as seen if they are in a prompt; None: no ids are marked.
    """
    P, T = count, tokens
    tokens_PT, next_PT = np.zeros((2, P, T), np.int32)
    length_P, start_P, left_P, prompt_P = np.zeros((4, P), np.int32)
    rows_P = np.full(P, no_row, np.int32)
    rows_P[list(places)] = rows
    seen_PV = None if known is None else np.zeros((P, known), bool)
    choices = [(Sampling(), 0)] * P
    for place, answer in zip(places, answers, strict=True):
        choices[place] = (answer.request.sampling or Sampling(), answer.sample)
        start, prompt = answer.read, answer.prompt
        size = min(len(prompt) - start, T)
        tokens_PT[place, :size] = prompt[start : start + size]
        following = prompt[start + 1 : start + size + 1]
        next_PT[place, : len(following)] = following
        length_P[place], start_P[place] = size, start
        prompt_P[place] = answer.request.asked
        if start + size == len(prompt):
            left_P[place] = answer.most
        if seen_PV is not None:
            seen_PV[place, [token for token in prompt if token < known]] = True
    return Chunk(
        tokens_PT,
        next_PT,
        length_P,
        rows_P,
        start_P,
        left_P,
        prompt_P,
        Choice.of(choices),
        seen_PV,
    )
