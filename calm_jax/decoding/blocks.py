"""Answers to many prompts, block by block, so that early answers can be saved at once."""

import itertools
from collections.abc import Iterator, Sequence

from calm_jax.decoding.generator import Completion, Generator, Prompt
from calm_jax.decoding.sampling import Sampling

ROUNDS = 4  # prompts in a block for each row: rows are idle only at the end of a block


def in_blocks(
    generator: Generator, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling]
) -> Iterator[list[Completion]]:
    """The answers to each prompt, in the order of the prompts, as from `Generator.generate`."""
    for block in balanced(len(prompts), ROUNDS * generator.slots):
        of_block = sampling if isinstance(sampling, Sampling) else sampling[block]
        yield from generator.generate(prompts[block], of_block)


def balanced(count: int, most: int) -> list[slice]:
    """Slices of `count` items with at most `most` each, of nearly one size."""
    parts = -(-count // most)
    ends = [-(-count * part // parts) for part in range(parts + 1)] if parts else []
    return [slice(*pair) for pair in itertools.pairwise(ends)]
