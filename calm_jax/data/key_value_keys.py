"""The keys of a world: different random strings of letters."""

import numpy as np

from calm_jax.data.key_value import NUMBER_WORDS, KeyValueConfig
from calm_jax.errors import CalmError

# After this many draws without anything new, there is assumed to be nothing more.
MAX_BARREN_ROUNDS = 20


def key_strings(config: KeyValueConfig, rng: np.random.Generator) -> list[str]:
    """Different random strings, none of them a number's word."""
    shortest, longest = config.key_length
    keys: dict[str, None] = {}  # keeps the order in which they were drawn
    starts: set[str] = set()
    barren = 0
    while len(keys) < config.keys:
        before = len(keys)
        lengths = rng.integers(shortest, longest + 1, config.keys)
        for letters, n in zip(random_letters(rng, config.keys, longest), lengths, strict=True):
            key = letters[:n]
            shorter = {key[:end] for end in range(1, n)}
            clash = key in starts or not shorter.isdisjoint(keys)
            if key not in NUMBER_WORDS and not (config.prefix_free and clash):
                keys[key] = None
                starts |= shorter
        barren = 0 if len(keys) > before else barren + 1
        if barren == MAX_BARREN_ROUNDS:
            raise CalmError(
                f"key-value config {config.name!r} needs {config.keys} keys of {config.key_length} "
                f"letters, but only {len(keys)} were found"
            )
    return list(keys)[: config.keys]


def random_letters(rng: np.random.Generator, number: int, length: int) -> list[str]:
    """`number` strings of `length` random letters."""
    letters = rng.integers(ord("a"), ord("z") + 1, (number, length)).astype(np.uint8)
    return letters.view(f"S{length}")[:, 0].astype(str).tolist()
