"""Scores of a set of predictions, and what guessing would reach. All shares are in percent."""

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

from calm_jax.errors import CalmError

# Quantile of the standard normal at 97.5 %: the half-width, in deviations, of a 95 % interval.
_Z_95 = 1.959963984540054


def is_exact_match(prediction: str, target: str) -> bool:
    """Whether the two texts are equal, apart from white space around them."""
    return prediction.strip() == target.strip()


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927), as (low, high) in percent.

    Unlike the normal interval it stays within 0 to 100 and is not empty at 0 or at 100 %, where the
    scores of this project often lie. Raises `CalmError` unless 0 <= correct <= count and count > 0.
    """
    if count < 1 or not 0 <= correct <= count:
        raise CalmError(f"an interval needs 0 <= correct <= count, not {correct} of {count}")
    share = correct / count
    z2 = _Z_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # At 0 and at `count` the formula gives exactly 0 and 1; rounding would leave a hair outside.
    low = 0.0 if correct == 0 else middle - half
    high = 1.0 if correct == count else middle + half
    return 100 * low, 100 * high


def best_constant(targets: Iterable[str]) -> tuple[str, float]:
    """The most frequent target and its share: what always giving one answer reaches at best.

    The answer is chosen from these very targets, so no constant chosen beforehand does better.
    Among equally frequent targets it is the first in alphabetical order.

    Raises `CalmError` without targets.
    """
    counts = collections.Counter(target.strip() for target in targets)
    if not counts:
        raise CalmError("a best constant answer needs at least one target")
    answer = min(counts, key=lambda target: (-counts[target], target))
    return answer, 100 * counts[answer] / counts.total()


def score(predictions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`{"exact_match", "count", "empty", "rewritten", "interval": [low, high]}` of predictions.

    Args:
        predictions: records with a bool "correct" and the text "prediction"; "written" where the
            vocabulary writes the target in another way.

    Raises `CalmError` without records.
    """
    records = list(predictions)
    if not records:
        raise CalmError("a score needs at least one prediction")
    right, count = sum(bool(record["correct"]) for record in records), len(records)
    return {
        "exact_match": 100 * right / count,
        "count": count,
        "empty": sum(not record["prediction"].strip() for record in records),
        "rewritten": sum("written" in record for record in records),
        "interval": list(wilson_interval(right, count)),
    }
