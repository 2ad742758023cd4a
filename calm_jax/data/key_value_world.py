"""The texts of key-value arithmetic, drawn from a `KeyValueConfig`; see `key_value`."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Set

import numpy as np

from calm_jax.data.key_value import (
    BRIDGE_PARTS,
    HALVES,
    MATH,
    NUMBER_WORDS,
    OPERATORS,
    SUBS,
    UNKNOWN,
    KeyValueConfig,
)
from calm_jax.data.key_value_keys import MAX_BARREN_ROUNDS, key_strings, random_letters
from calm_jax.data.key_value_sums import answer, numeral
from calm_jax.errors import CalmError

# What a fold of the expressions is used for; a hash assigns expressions to folds.
TRAIN, VALIDATION, EVALUATION = 0, 1, 2
FOLDS = {"train": TRAIN, "validation": VALIDATION, "evaluation": EVALUATION}

# If an augment knows one half of the keys: share of its texts' keys that are unknown letters.
STRANGERS = 0.3


@dataclasses.dataclass(frozen=True)
class Expressions:
    """N expressions of K operands each.

    Attributes:
      operands_NK: a key's index, or the number of keys + a plain number.
      operators_NJ: index into `OPERATORS`, J = K − 1.
    """

    operands_NK: np.ndarray
    operators_NJ: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "Expressions":
        return Expressions(self.operands_NK[rows], self.operators_NJ[rows])

    def __len__(self) -> int:
        return len(self.operands_NK)

    def texts(self, operand_texts_NK: np.ndarray) -> list[str]:
        """Each expression with its operands written as `operand_texts_NK`."""
        signs_NJ = np.array(list(OPERATORS))[self.operators_NJ].tolist()
        return [
            operands[0] + "".join(map("".join, zip(signs, operands[1:], strict=True)))
            for operands, signs in zip(operand_texts_NK.tolist(), signs_NJ, strict=True)
        ]


class World:
    """The keys of a config, their values, and the texts that can be drawn.

    Attributes:
      keys: key strings, in the order of their index.
      values: the value of each key.
      seen: for each key, whether the bridge's training may contain it.
      half: for each key, which of `HALVES` it belongs to.
    """

    def __init__(self, config: KeyValueConfig):
        self.config = config
        rng = self._rng("keys")
        low, high = config.values
        self.keys = key_strings(config, rng)
        if config.unique_values:
            self.values = low + rng.permutation(high - low + 1)[: config.keys]
        else:
            self.values = rng.integers(low, high + 1, config.keys)
        self.seen = np.zeros(config.keys, bool)
        self.seen[rng.permutation(config.keys)[: round(config.bridge_keys * config.keys)]] = True
        self.half = np.repeat(HALVES, (config.keys // 2, config.keys - config.keys // 2))
        self._numbers = np.array([*self.values.tolist(), *range(high + 1)], object)
        self._numerals = np.array([numeral(n, config) for n in self._numbers], object)
        self._names = np.array([*self.keys, *self._numerals[config.keys :]], object)

    def examples(self, corpus: str, split: str) -> Iterator[dict]:
        """Examples of a split of a corpus (`CORPORA`): inputs, targets, set, operands, unseen.

        `unseen`: the expression has keys, but none that the bridge trains on. Every call gives the
        same examples.
        """
        rng = self._rng(f"{corpus}/{split}")
        kind, _, half = corpus.partition("_")
        if kind == "augment":
            return self._augment(rng, split, half)
        return getattr(self, f"_{kind}")(rng, split)

    def _rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, zlib.crc32(purpose.encode())])

    # The corpora.

    def _augment(self, rng: np.random.Generator, split: str, half: str) -> Iterator[dict]:
        c = self.config
        known = np.flatnonzero(self.half == half) if half else np.arange(c.keys)
        count = c.augment_examples if split == "train" else c.validation_examples
        for group in self._draw(rng, count, split, known, c.augment_plain, c.augment_single):
            names_NK = self._names[group.operands_NK]
            numbers_NK = self._numerals[group.operands_NK]
            is_key_NK = group.operands_NK < c.keys
            strange_NK = np.zeros_like(is_key_NK)
            if half:
                strange_NK = is_key_NK & (rng.random(is_key_NK.shape) < STRANGERS)
                letters_NK = self._random_letters(rng, is_key_NK.shape, {*self._names[known]})
                names_NK = np.where(strange_NK, letters_NK, names_NK)
                numbers_NK = np.where(strange_NK, UNKNOWN, numbers_NK)
            asked = group.texts(names_NK)
            inline = group.texts(_behind(names_NK, numbers_NK, is_key_NK))
            written = inline if c.written_out else group.texts(numbers_NK)
            is_inline = rng.random(len(group)) < c.augment_inline
            markers = np.array([SUBS, MATH])[rng.integers(2, size=len(group))].tolist()
            unseen = self._unseen(group, strange_NK)
            for i in range(len(group)):
                if is_inline[i]:
                    yield _example(markers[i], inline[i], "inline", group, unseen[i])
                elif c.written_out and markers[i] == MATH:
                    # What stands before the calculation, which is the anchor's.
                    yield _example(f"{MATH}{asked[i]}=", f"{inline[i]}=", "subs", group, unseen[i])
                else:
                    yield _example(f"{SUBS}{asked[i]}=", written[i], "subs", group, unseen[i])

    def _anchor(self, rng: np.random.Generator, split: str) -> Iterator[dict]:
        c = self.config
        count = c.anchor_examples if split == "train" else c.validation_examples
        for group in self._draw(rng, count, split, None, 1.0, c.anchor_single):
            unknown = rng.random(len(group)) < c.anchor_unknown
            names_NK, nameless_NK = self._spelled(rng, group, unknown)
            asked = group.texts(names_NK)
            written = self._substituted(group, names_NK, nameless_NK)
            answers = self._answers(group, written)
            repeats = rng.random(len(group)) < c.anchor_repeat
            for i in range(len(group)):
                if unknown[i] and not c.written_out:
                    yield _example(f"{MATH}{asked[i]}=", UNKNOWN, "unknown", group, False)
                elif repeats[i]:
                    yield _example(f"{SUBS}{asked[i]}=", written[i], "repeat", group, False)
                else:  # where letters are written out, the anchor guesses a number for them
                    name = "unknown" if unknown[i] else "num"
                    yield _example(f"{MATH}{asked[i]}=", answers[i], name, group, False)

    def _bridge(self, rng: np.random.Generator, split: str) -> Iterator[dict]:
        c = self.config
        name, fold = split.split("_")
        rate = c.bridge_rates[BRIDGE_PARTS.index(name)]
        count = round(c.bridge_examples * rate) if fold == "train" else c.validation_examples
        keys, plain = (None, 1.0) if name == "num" else (np.flatnonzero(self.seen), c.bridge_plain)
        for group in self._draw(rng, count, fold, keys, plain, c.bridge_single, longer=True):
            yield from self._asked(name, group)

    def _evaluation(self, rng: np.random.Generator, split: str) -> Iterator[dict]:
        name, _, of = split.partition("_")
        asked = self.seen if of == "seen" else ~self.seen
        asked = asked & (self.half == of) if of in HALVES else asked
        keys = None if name == "num" else np.flatnonzero(asked)
        for group in self._draw(rng, self.config.evaluation_examples, "evaluation", keys, 0.0, 0.0):
            yield from self._asked(name, group)

    def _asked(self, name: str, group: Expressions) -> Iterator[dict]:
        of_NK = group.operands_NK
        written = self._substituted(group, self._names[of_NK], of_NK < self.config.keys)
        marker = SUBS if name == "subs" else MATH
        answers = written if name == "subs" else self._answers(group, written)
        unseen = self._unseen(group)
        for text, due, new in zip(self._written(group), answers, unseen, strict=True):
            yield _example(f"{marker}{text}=", due, name, group, new)

    # Drawing expressions.

    def _draw(
        self,
        rng: np.random.Generator,
        count: int,
        fold: str,
        keys: np.ndarray | None,
        plain: float,
        single: float,
        longer: bool = False,
    ) -> list[Expressions]:
        """`count` expressions assigned to `fold`, in groups with the same number of operands.

        Operands are drawn from `keys`; a share `plain` of them, but never all of an expression, are
        plain numbers. Without keys all are. Only training has expressions of one operand, and
        repeats expressions. With `longer`, groups are in proportion to their number of operands.
        """
        fewest, most = self.config.operands
        sizes = range(fewest, most + 1)
        rates = {size: float(size) if longer and fold == "train" else 1.0 for size in sizes}
        if fold == "train":
            total = sum(rates.values())
            rates = {1: single} | {n: (1 - single) * rate / total for n, rate in rates.items()}
        shares = np.array(list(rates.values())) / sum(rates.values())
        groups, missing = [], 0
        for size, number in zip(rates, rng.multinomial(count, shares).tolist(), strict=True):
            # There may be too few short expressions; then longer ones replace the missing ones.
            draw = functools.partial(self._random, rng, size, keys, plain)
            group = self._draw_of_size(draw, number + missing, fold)
            missing += number - len(group)
            groups.append(group)
        if missing:
            raise CalmError(
                f"key-value config {self.config.name!r}: {fold} needs {count} different "
                f"expressions, but only {count - missing} were found"
            )
        return groups

    def _draw_of_size(
        self, draw: Callable[[int], Expressions], count: int, fold: str
    ) -> Expressions:
        """`count` expressions of those that `draw` gives, or fewer if no more can be found."""
        parts = [draw(0)]
        found = barren = 0
        met: set[bytes] = set()
        while found < count and barren < MAX_BARREN_ROUNDS:
            group = draw(count + 64)
            group = group[self._dealt_to(group, fold)]
            if fold != "train":
                group = group[_new(group, met)]
            group = group[np.arange(len(group)) < count - found]
            parts.append(group)
            found += len(group)
            barren = 0 if len(group) else barren + 1
        return Expressions(
            np.concatenate([part.operands_NK for part in parts]),
            np.concatenate([part.operators_NJ for part in parts]),
        )

    def _random(
        self,
        rng: np.random.Generator,
        size: int,
        keys: np.ndarray | None,
        plain: float,
        number: int,
    ) -> Expressions:
        low, high = self.config.values
        operands_NK = self.config.keys + rng.integers(low, high + 1, (number, size))
        if keys is not None:
            is_key_NK = rng.random((number, size)) >= plain
            is_key_NK[np.arange(number), rng.integers(size, size=number)] = True
            operands_NK = np.where(is_key_NK, rng.choice(keys, (number, size)), operands_NK)
        allowed = np.array([OPERATORS.index(operator) for operator in self.config.operators])
        return Expressions(operands_NK, rng.choice(allowed, (number, size - 1)))

    def _dealt_to(self, group: Expressions, fold: str) -> np.ndarray:
        """Which expressions belong to the fold [N]."""
        as_written = self._deal(group)
        if fold != "train":
            return as_written == FOLDS[fold]
        numeric_NK = self.config.keys + self._numbers[group.operands_NK].astype(np.int64)
        return (as_written == TRAIN) & (
            self._deal(Expressions(numeric_NK, group.operators_NJ)) == TRAIN
        )

    def _deal(self, group: Expressions) -> np.ndarray:
        """The fold of each expression as it is written, by a hash [N]; one operand: training."""
        if group.operands_NK.shape[1] == 1:
            return np.full(len(group), TRAIN)
        hash_N = np.full(len(group), self.config.seed, np.uint64)
        for column in (*group.operands_NK.T, *group.operators_NJ.T):
            hash_N = _mix(hash_N ^ column.astype(np.uint64))
        share_N = hash_N / 2.0**64
        c = self.config
        return np.select(
            [share_N < c.evaluation_fold, share_N < c.evaluation_fold + c.validation_fold],
            [EVALUATION, VALIDATION],
            TRAIN,
        )

    # Writing them down.

    def _written(self, group: Expressions) -> list[str]:
        return group.texts(self._names[group.operands_NK])

    def _substituted(
        self, group: Expressions, names_NK: np.ndarray, nameless_NK: np.ndarray
    ) -> list[str]:
        """Numbers for operands; written out, each behind its name if that does not tell it."""
        numerals_NK = self._numerals[group.operands_NK]
        if not self.config.written_out:
            return group.texts(numerals_NK)
        return group.texts(_behind(names_NK, numerals_NK, nameless_NK))

    def _answers(self, group: Expressions, written: list[str]) -> list[str]:
        """What MATH asks for."""
        of_NK = group.operands_NK
        signs_NJ = np.array(list(OPERATORS))[group.operators_NJ]
        rows = (self._numerals[of_NK], self._numbers[of_NK], signs_NJ)
        rows = zip(*(row_NK.tolist() for row_NK in rows), strict=True)
        answers = [answer(*row, self.config) for row in rows]
        if not self.config.written_out:
            return answers
        return [f"{text}={rest}" for text, rest in zip(written, answers, strict=True)]

    def _unseen(self, group: Expressions, strange_NK: np.ndarray | bool = False) -> list[bool]:
        is_key_NK = (group.operands_NK < self.config.keys) & ~np.asarray(strange_NK)
        # Plain numbers count as unseen, so that only the keys decide.
        unseen_NK = ~np.append(self.seen, False)[np.where(is_key_NK, group.operands_NK, -1)]
        return (unseen_NK.all(1) & is_key_NK.any(1)).tolist()

    def _spelled(
        self, rng: np.random.Generator, group: Expressions, unknown: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The anchor's operands, and which of them have no digits [N, K].

        They are words, numbers, numbers after letters, or only letters where `unknown`.
        """
        c, shape = self.config, group.operands_NK.shape
        texts_NK = self._names[group.operands_NK]
        numbers_NK = self._numbers[group.operands_NK].astype(int)
        word_NK = (rng.random(shape) < c.anchor_words) & (numbers_NK < len(NUMBER_WORDS))
        words = np.array(NUMBER_WORDS, object)
        texts_NK = np.where(word_NK, words[np.where(word_NK, numbers_NK, 0)], texts_NK)
        letters_NK = self._random_letters(rng, shape)
        filled_NK = ~word_NK & (rng.random(shape) < c.anchor_filler)
        texts_NK = np.where(filled_NK, letters_NK + texts_NK, texts_NK)
        unknown_NK = unknown[:, None] & (rng.random(shape) < 0.8)
        unknown_NK[np.arange(len(group)), rng.integers(shape[1], size=len(group))] |= unknown
        return np.where(unknown_NK, letters_NK, texts_NK), word_NK | unknown_NK

    def _random_letters(
        self, rng: np.random.Generator, shape: tuple[int, ...], not_first: Set[str] = frozenset()
    ) -> np.ndarray:
        """Strings of up to a key's letters, none of them a key or a number's word.

        None starts with a string of `not_first`.
        """
        longest = self.config.key_length[1]
        taken = {*self.keys, *NUMBER_WORDS}
        strings: list[str] = []
        while len(strings) < math.prod(shape):
            lengths = rng.integers(1, longest + 1, math.prod(shape))
            drawn = random_letters(rng, len(lengths), longest)
            cut = (letters[:n] for letters, n in zip(drawn, lengths, strict=True))
            strings += [
                letters
                for letters in cut
                if letters not in taken
                and not_first.isdisjoint(letters[:end] for end in range(1, len(letters)))
            ]
        return np.array(strings[: math.prod(shape)], object).reshape(shape)


def _behind(names_NK: np.ndarray, numerals_NK: np.ndarray, which_NK: np.ndarray) -> np.ndarray:
    """The names, some of them with their number behind them."""
    return names_NK + np.where(which_NK, numerals_NK, "").astype(object)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the result depends on every bit of `x` [N] uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _new(group: Expressions, met: set[bytes]) -> np.ndarray:
    """Which expressions are not in `met` yet [N]; adds them all."""
    new = np.zeros(len(group), bool)
    for i, row in enumerate(np.concatenate([group.operands_NK, group.operators_NJ], axis=1)):
        if (name := row.tobytes()) not in met:
            met.add(name)
            new[i] = True
    return new


def _example(inputs: str, targets: str, name: str, group: Expressions, unseen: bool) -> dict:
    return {
        "inputs": inputs,
        "targets": targets,
        "set": name,
        "operands": group.operands_NK.shape[1],
        "unseen": unseen,
    }
