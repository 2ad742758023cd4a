"""Key-value arithmetic (CALM paper, section 4.1): keys with secret values, and sums over both.

One `KeyValueConfig` fixes a world: its keys, their values, and which of them the bridge may see.
Every text opens with a marker, for substitution and arithmetic would else ask the same question:

    set       inputs              targets     written for
    subs      <subs>abc+de=       12+7        augment, bridge (seen keys), evaluation
    inline    <subs>              abc12+de7   augment (the value at the key itself)
    num       <math>12+7=         19          anchor, bridge, evaluation
    repeat    <subs>12+7=         12+7        anchor
    math      <math>abc+de=       19          bridge (seen keys), evaluation

Keys are strings of random lower-case letters; values and their assignment are random.
`*` is done before `+` and `-`. A hash deals every expression, once as it is written and once with
its keys replaced by their values, to training, validation or evaluation. What is trained on, by
any model, is dealt to training both ways; so no evaluated expression is ever trained on.
"""

import dataclasses
import functools
import hashlib
import json
import re
import zlib
from collections.abc import Iterator

import numpy as np

from calm_jax.data.vocabulary import TokenizerVocabulary
from calm_jax.errors import CalmError

SUBS, MATH = "<subs>", "<math>"
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
OPERATORS = "+-*"

# What a fold of the expressions is used for, by the hash that deals them.
TRAIN, VALIDATION, EVALUATION = 0, 1, 2
FOLDS = {"train": TRAIN, "validation": VALIDATION, "evaluation": EVALUATION}

BRIDGE_PARTS = ("math", "subs", "num")

# The splits of each corpus: what TFDS prepares together.
CORPORA = {
    "augment": ("train", "validation"),
    "anchor": ("train", "validation"),
    "bridge": tuple(f"{part}_{fold}" for part in BRIDGE_PARTS for fold in ("train", "validation")),
    "evaluation": ("subs", "num", "math", "math_seen"),
}

MAX_NUMBER_TOKENS = 100_000
MAX_ROUNDS = 200


@dataclasses.dataclass(frozen=True)
class KeyValueConfig:
    """A world of keys and the texts drawn from it; every count is a number of examples.

    Attributes:
      keys: number of keys.
      key_length: shortest and longest key, in letters.
      values: smallest and largest value; plain numbers have the same range.
      unique_values: no two keys share a value.
      operands: fewest and most operands of an expression.
      operators: which of + - * occur.
      number_tokens: a number is one token; else each of its digits is.
      bridge_keys: share of the keys that the bridge's training may contain.
      evaluation_fold, validation_fold: shares of all expressions kept from training.
      augment_inline: share of inline texts in the augment's training.
      augment_plain, bridge_plain: share of plain numbers among operands beside keys.
      augment_single, anchor_single, bridge_single: share of expressions of one operand.
      anchor_repeat: share of repeats in the anchor's training.
      anchor_filler: share of the anchor's expressions with random letters around their numbers.
      bridge_rates: shares of math, subs and num in the bridge's training.
    """

    name: str
    keys: int = 1_000
    key_length: tuple[int, int] = (2, 4)
    values: tuple[int, int] = (0, 9)
    unique_values: bool = False
    operands: tuple[int, int] = (2, 3)
    operators: str = "+-"
    number_tokens: bool = True
    bridge_keys: float = 0.2
    evaluation_fold: float = 0.27
    validation_fold: float = 0.06
    augment_examples: int = 100_000
    augment_inline: float = 0.5
    augment_plain: float = 0.2
    augment_single: float = 0.1
    anchor_examples: int = 100_000
    anchor_repeat: float = 0.2
    anchor_filler: float = 0.5
    anchor_single: float = 0.1
    bridge_examples: int = 150_000
    bridge_rates: tuple[float, float, float] = (0.6, 0.2, 0.2)
    bridge_plain: float = 0.4
    bridge_single: float = 0.2
    validation_examples: int = 200
    evaluation_examples: int = 1_000
    seed: int = 0

    def __post_init__(self):
        low, high = self.values
        problems = {
            f"values {self.values} must be 0 or more, smallest first": not 0 <= low <= high,
            f"operators {self.operators!r} must be some of {OPERATORS!r}": (
                not self.operators or not set(self.operators) <= set(OPERATORS)
            ),
            f"operands {self.operands} must be 2 or more, fewest first": (
                not 2 <= self.operands[0] <= self.operands[1]
            ),
            f"{self.keys} keys cannot have unique values in {self.values}": (
                self.unique_values and self.keys > high - low + 1
            ),
            f"{self.keys} keys of {self.key_length} letters do not exist": (
                self.keys > sum(26**n for n in range(self.key_length[0], self.key_length[1] + 1))
            ),
            f"number_tokens would take {self.largest_number:,} tokens": (
                self.number_tokens and self.largest_number > MAX_NUMBER_TOKENS
            ),
            f"bridge_rates {self.bridge_rates} must sum to 1": (
                abs(sum(self.bridge_rates) - 1) > 1e-6
            ),
        }
        for problem, found in problems.items():
            if found:
                raise CalmError(f"key-value config {self.name!r}: {problem}")

    @property
    def largest_number(self) -> int:
        """No value, plain number or result is larger, either side of 0."""
        high, most = self.values[1], self.operands[1]
        return max(high * most, high**most if "*" in self.operators else 0)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the data: equal exactly if every field is."""
        fields = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:16]


DEFAULT = "demo"
CONFIGS: dict[str, KeyValueConfig] = {
    config.name: config
    for config in (
        KeyValueConfig("demo"),
        # The paper's sizes; how many expressions it trained on it does not say.
        KeyValueConfig(
            "paper",
            keys=25_000,
            key_length=(2, 6),
            values=(1, 25_000),
            unique_values=True,
            operands=(3, 6),
            operators="+-*",
            number_tokens=False,
            evaluation_fold=0.05,
            augment_examples=2_000_000,
            anchor_examples=2_000_000,
            bridge_examples=1_000_000,
        ),
        KeyValueConfig(
            "tiny",
            keys=60,
            key_length=(2, 3),
            evaluation_fold=0.2,
            augment_examples=600,
            anchor_examples=600,
            bridge_examples=600,
            validation_examples=40,
            evaluation_examples=60,
        ),
    )
}


def config(name: str) -> KeyValueConfig:
    """The config of that name; raises `CalmError` if there is none."""
    if name not in CONFIGS:
        raise CalmError(f"no key-value config {name!r}; known are {sorted(CONFIGS)}")
    return CONFIGS[name]


def vocabulary(name: str) -> TokenizerVocabulary:
    """The task's own tokens: specials, markers, letters, operators, `=`, and numbers or digits."""
    import tokenizers

    world = config(name)
    largest = world.largest_number if world.number_tokens else 9
    numbers = [str(n) for n in range(max(largest, 9) + 1)]
    tokens = [*SPECIALS, SUBS, MATH, *OPERATORS, "=", *LETTERS, *numbers]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex("<[a-z]+>|[0-9]+|." if world.number_tokens else "<[a-z]+>|."), "isolated"
    )
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIALS))
    return TokenizerVocabulary(tokenizer.to_str(), ids["<bos>"], ids["<eos>"])


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
      seen: whether the bridge's training may contain it.
    """

    def __init__(self, config: KeyValueConfig):
        self.config = config
        rng = self._rng("keys")
        low, high = config.values
        self.keys = _key_strings(config, rng)
        if config.unique_values:
            self.values = low + rng.permutation(high - low + 1)[: config.keys]
        else:
            self.values = rng.integers(low, high + 1, config.keys)
        self.seen = np.zeros(config.keys, bool)
        self.seen[rng.permutation(config.keys)[: round(config.bridge_keys * config.keys)]] = True
        self._names = np.array([*self.keys, *map(str, range(high + 1))], object)
        self._numbers = np.array([*self.values.tolist(), *range(high + 1)], object)

    def examples(self, corpus: str, split: str) -> Iterator[dict]:
        """Examples of a split of a corpus (`CORPORA`): inputs, targets, set, operands, unseen.

        `unseen`: the expression has keys, and none of them is the bridge's. The same at every call.
        """
        rng = self._rng(f"{corpus}/{split}")
        return getattr(self, f"_{corpus}")(rng, split)

    def _rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, zlib.crc32(purpose.encode())])

    # The corpora.

    def _augment(self, rng: np.random.Generator, split: str) -> Iterator[dict]:
        c = self.config
        every_key = np.arange(c.keys)
        count = c.augment_examples if split == "train" else c.validation_examples
        for group in self._draw(rng, count, split, every_key, c.augment_plain, c.augment_single):
            asked, written = self._written(group), self._substituted(group)
            inline_NK = self._names[group.operands_NK] + np.where(
                group.operands_NK < c.keys, self._numbers[group.operands_NK].astype(str), ""
            ).astype(object)
            inline = group.texts(inline_NK)
            is_inline = rng.random(len(group)) < c.augment_inline
            markers = np.array([SUBS, MATH])[rng.integers(2, size=len(group))].tolist()
            unseen = self._unseen(group)
            for i in range(len(group)):
                if is_inline[i]:
                    yield _example(markers[i], inline[i], "inline", group, unseen[i])
                else:
                    yield _example(f"{SUBS}{asked[i]}=", written[i], "subs", group, unseen[i])

    def _anchor(self, rng: np.random.Generator, split: str) -> Iterator[dict]:
        c = self.config
        count = c.anchor_examples if split == "train" else c.validation_examples
        for group in self._draw(rng, count, split, None, 1.0, c.anchor_single):
            filled_NK = self._names[group.operands_NK]
            filled = rng.random(len(group)) < c.anchor_filler
            filled_NK[filled] = self._filler(rng, filled_NK[filled])
            asked = group.texts(filled_NK)
            written, results = self._written(group), self._results(group)
            repeats = rng.random(len(group)) < c.anchor_repeat
            for i in range(len(group)):
                if repeats[i]:
                    yield _example(f"{SUBS}{asked[i]}=", written[i], "repeat", group, False)
                else:
                    yield _example(f"{MATH}{asked[i]}=", results[i], "num", group, False)

    def _bridge(self, rng: np.random.Generator, split: str) -> Iterator[dict]:
        c = self.config
        name, fold = split.split("_")
        rate = c.bridge_rates[BRIDGE_PARTS.index(name)]
        count = round(c.bridge_examples * rate) if fold == "train" else c.validation_examples
        keys, plain = (None, 1.0) if name == "num" else (np.flatnonzero(self.seen), c.bridge_plain)
        for group in self._draw(rng, count, fold, keys, plain, c.bridge_single):
            yield from self._asked(name, group)

    def _evaluation(self, rng: np.random.Generator, split: str) -> Iterator[dict]:
        keys = None if split == "num" else np.flatnonzero(self.seen == (split == "math_seen"))
        for group in self._draw(rng, self.config.evaluation_examples, "evaluation", keys, 0.0, 0.0):
            yield from self._asked(split.partition("_")[0], group)

    def _asked(self, name: str, group: Expressions) -> Iterator[dict]:
        marker, answers = (
            (SUBS, self._substituted(group)) if name == "subs" else (MATH, self._results(group))
        )
        unseen = self._unseen(group)
        for text, answer, new in zip(self._written(group), answers, unseen, strict=True):
            yield _example(f"{marker}{text}=", answer, name, group, new)

    # Drawing expressions.

    def _draw(
        self,
        rng: np.random.Generator,
        count: int,
        fold: str,
        keys: np.ndarray | None,
        plain: float,
        single: float,
    ) -> list[Expressions]:
        """`count` expressions dealt to `fold`, in groups of as many operands.

        Operands are of `keys`, a share `plain` of them plain numbers but never all; without keys,
        plain numbers only. Only training has expressions of one operand and repeats expressions.
        """
        fewest, most = self.config.operands
        sizes = np.arange(fewest, most + 1)
        if fold == "train":
            sizes = np.concatenate([[1], sizes])
            rates = np.array([single] + [(1 - single) / (len(sizes) - 1)] * (len(sizes) - 1))
        else:
            rates = np.full(len(sizes), 1 / len(sizes))
        groups: dict[int, list[Expressions]] = {size: [] for size in sizes.tolist()}
        found = rounds = 0
        met: set[bytes] = set()
        while found < count:
            if rounds == MAX_ROUNDS:
                raise CalmError(
                    f"key-value config {self.config.name!r}: {count} different expressions were "
                    f"asked for {fold}, but only {found} were found"
                )
            rounds += 1
            for size, number in zip(
                groups, rng.multinomial(count + 64, rates).tolist(), strict=True
            ):
                group = self._random(rng, number, size, keys, plain)
                group = group[self._dealt_to(group, fold)]
                if fold != "train":
                    group = group[_new(group, met)]
                group = group[np.arange(len(group)) < count - found]
                groups[size].append(group)
                found += len(group)
        return [
            Expressions(
                np.concatenate([g.operands_NK for g in parts]),
                np.concatenate([g.operators_NJ for g in parts]),
            )
            for parts in groups.values()
        ]

    def _random(
        self,
        rng: np.random.Generator,
        number: int,
        size: int,
        keys: np.ndarray | None,
        plain: float,
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
        """The fold of each expression as it stands, by a hash [N]. One operand: always training."""
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

    def _substituted(self, group: Expressions) -> list[str]:
        return group.texts(self._numbers[group.operands_NK].astype(str))

    def _results(self, group: Expressions) -> list[str]:
        # Python integers: six factors of 25,000 do not fit 64 bits.
        numbers_NK = self._numbers[group.operands_NK]
        total_N, term_N = np.zeros(len(group), object), numbers_NK[:, 0]
        for number_N, operator_N in zip(numbers_NK.T[1:], group.operators_NJ.T, strict=True):
            times_N = operator_N == OPERATORS.index("*")
            total_N = np.where(times_N, total_N, total_N + term_N)
            signed_N = np.where(operator_N == OPERATORS.index("-"), -number_N, number_N)
            term_N = np.where(times_N, term_N * number_N, signed_N)
        return [str(result) for result in total_N + term_N]

    def _unseen(self, group: Expressions) -> list[bool]:
        is_key_NK = group.operands_NK < self.config.keys
        # Plain numbers count as unseen, so that the keys alone decide.
        unseen_NK = ~np.append(self.seen, False)[np.where(is_key_NK, group.operands_NK, -1)]
        return (unseen_NK.all(1) & is_key_NK.any(1)).tolist()

    def _filler(self, rng: np.random.Generator, texts_NK: np.ndarray) -> np.ndarray:
        """Up to a key's letters before each number, or after it, or both."""
        where_NK = rng.integers(1, 4, texts_NK.shape)
        before_NK, after_NK = (self._random_letters(rng, texts_NK.shape) for _ in range(2))
        before_NK[where_NK == 2] = ""
        after_NK[where_NK == 1] = ""
        return before_NK + texts_NK + after_NK

    def _random_letters(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        longest = self.config.key_length[1]
        letters = rng.integers(ord("a"), ord("z") + 1, (*shape, longest)).astype(np.uint8)
        words = letters.view(f"S{longest}")[..., 0].astype(str)
        lengths = rng.integers(1, longest + 1, shape)
        cut = [word[:n] for word, n in zip(words.flat, lengths.flat, strict=True)]
        return np.array(cut, object).reshape(shape)


def parse_task(task: str) -> KeyValueConfig | None:
    """The config of a task named `calm_jax/key_value/CONFIG/…`; None for any other name."""
    match = re.fullmatch(r"calm_jax/key_value/([^/]+)/[^/]+", task)
    return config(match[1]) if match else None


def _key_strings(config: KeyValueConfig, rng: np.random.Generator) -> list[str]:
    shortest, longest = config.key_length
    keys: dict[str, None] = {}  # keeps the order in which they were drawn
    while len(keys) < config.keys:
        lengths = rng.integers(shortest, longest + 1, config.keys)
        letters = rng.integers(ord("a"), ord("z") + 1, (config.keys, longest)).astype(np.uint8)
        keys |= dict.fromkeys(
            row.tobytes()[:n].decode() for row, n in zip(letters, lengths, strict=True)
        )
    return list(keys)[: config.keys]


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the result depends on every bit of `x` [N] uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _new(group: Expressions, met: set[bytes]) -> np.ndarray:
    """Which expressions were not met before [N]; all are met afterwards."""
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
