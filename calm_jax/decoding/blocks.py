"""Answers to many prompts, some at a time, so that each can be kept before the last is there."""

from collections.abc import Iterator, Sequence

from calm_jax.decoding.generator import Completion, Generator, Prompt
from calm_jax.decoding.sampling import Sampling

ROUNDS = 4  # prompts of a block for each row: rows stand idle only at the end of a block


def in_blocks(
    generator: Generator, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling]
) -> Iterator[list[Completion]]:
    """The answers to each prompt, in the order of the prompts, as `Generator.generate` says."""
    size = ROUNDS * generator.scheduler.slots
    for start in range(0, len(prompts), size):
        of_block = sampling if isinstance(sampling, Sampling) else sampling[start : start + size]
        yield from generator.generate(prompts[start : start + size], of_block)
