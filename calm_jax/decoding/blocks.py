"""Answers to many prompts, block by block, so that early answers can be saved at once."""

from collections.abc import Iterator, Sequence

from calm_jax.decoding.generator import Completion, Generator, Prompt
from calm_jax.decoding.sampling import Sampling

ROUNDS = 4  # prompts in a block for each row: rows are idle only at the end of a block


def in_blocks(
    generator: Generator, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling]
) -> Iterator[list[Completion]]:
    """The answers to each prompt, in the order of the prompts, as from `Generator.generate`."""
    size = ROUNDS * generator.slots
    for start in range(0, len(prompts), size):
        of_block = sampling if isinstance(sampling, Sampling) else sampling[start : start + size]
        yield from generator.generate(prompts[start : start + size], of_block)
