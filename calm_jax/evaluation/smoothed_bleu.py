"""Smoothed BLEU-4 of one sentence, as CodeXGLUE scores descriptions of code.

Counts of pairs, triples and quadruples are smoothed by one (Lin and Och 2004, COLING), texts are
compared in lower case and cut into words and punctuation as NIST's mteval-v11a does; the penalty
for short answers counts one word more on both sides.
"""

import collections
import math
import re
import sys

_ORDER = 4
_PUNCTUATION = (
    (r"([{-~\[-` -&(-+:-@/])", r" \1 "),
    (r"([^0-9])([.,])", r"\1 \2 "),
    (r"([.,])([^0-9])", r" \1 \2"),
    (r"([0-9])(-)", r"\1 \2 "),
)


def smoothed_bleu4(target: str, prediction: str) -> float:
    """The score of one prediction, from 0 to 1."""
    reference, answer = _words(target), _words(prediction)
    known, found = _counts(reference), _counts(answer)
    logarithm = 0.0
    for length in range(1, _ORDER + 1):
        said = max(len(answer) - length + 1, 0)
        right = sum(
            min(count, known[words]) for words, count in found.items() if len(words) == length
        )
        smoothing = int(length > 1)
        # The least float stands for zero, whose logarithm there is none.
        logarithm += math.log(right + smoothing + sys.float_info.min)
        logarithm -= math.log(said + smoothing + sys.float_info.min)
    penalty = min(0.0, 1 - (len(reference) + 1) / (len(answer) + 1))
    return math.exp(logarithm / _ORDER + penalty)


def _words(text: str) -> list[str]:
    # Punctuation is parted twice: by the task's own rule, then by that of mteval.
    text = " ".join(re.findall(r"\w+|[^\s\w]", text.strip().lower()))
    text = f" {text} "
    for pattern, replacement in _PUNCTUATION:
        text = re.sub(pattern, replacement, text)
    return text.split()


def _counts(words: list[str]) -> collections.Counter:
    return collections.Counter(
        tuple(words[start : start + length])
        for length in range(1, _ORDER + 1)
        for start in range(len(words) - length + 1)
    )
