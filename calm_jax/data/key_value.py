"""Key-value arithmetic (CALM paper, section 4.1): keys with secret values, and sums over both.

One `KeyValueConfig` fixes a world: its keys, their values, and which of them the bridge may see.
Every text opens with a marker, since substitution and arithmetic would else ask the same question:

    set       inputs              targets     written for
    subs      <subs>abc+de=       12+7        augment, bridge (seen keys), evaluation
    inline    <subs>              abc12+de7   augment (the value at the key itself)
    num       <math>12+7=         19          anchor, bridge, evaluation
    repeat    <subs>12+7=         12+7        anchor
    unknown   <math>xyz+7=        ?           anchor (letters without a meaning)
    math      <math>abc+de=       19          bridge (seen keys), evaluation

A value of several tokens is never whole at its key: there a language model knows the first token,
and each further one once it has written those before it. So where a digit is a token, answers can
be written out (`written_out`). They repeat the expression with each value behind its key, where
a model that knows it finds it soonest, and then take one operation after another:

    subs      <subs>abc+de-3=     abc12+de7-3
    subs      <math>abc+de-3=     abc12+de7-3=             augment
    num       <math>12+7-3=       12+7-3=12+7=19-3=16
    math      <math>abc+de-3=     abc12+de7-3=12+7=19-3=16
    unknown   <math>xyz+7=        xyz4+7=4+7=11            anchor (a guess, with which it goes on)

With `complement_digits` a number is written as adders take it, and an operation in columns: after
the operator, for every digit, that of both operands and of the result. In two digits:

    num       <math>21+70-30=     21+70-30=+279101-936101

`demo_share_5` is the world of `demo`, of whose keys the bridge may see 5 % (`SHARES`). Keys and
values are the same at every share, and those that are seen at one are seen at every larger one. So
`math` and `subs` of `demo_share_50` ask for keys that the bridge sees at no share.

Instead of one augment that knows every key there may be two. Each knows one half of the keys
(`HALVES`), never sees a key of the other half, and writes `?` for letters that it does not know.

Keys are strings of random lower-case letters; values and their assignment are random.
`*` is done before `+` and `-`. A hash assigns every expression, once as it is written and once with
its keys replaced by their values, to training, validation or evaluation. Any model trains only on
expressions assigned to training both ways, so no evaluated expression is ever trained on.
"""

import dataclasses
import functools
import hashlib
import json
import re

from calm_jax.data.tokenizer_vocabulary import TokenizerVocabulary
from calm_jax.errors import CalmError

TASKS = "calm_jax.data.key_value_tasks"  # registers them with seqio
VERSION = "1.0.0"  # version of the texts: a new one regenerates all data

SUBS, MATH, UNKNOWN = "<subs>", "<math>", "?"
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
OPERATORS = "+-*"
NUMBER_WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
]

BRIDGE_PARTS = ("math", "subs", "num")
HALVES = ("first", "second")  # halves of the keys, in the order of their index

# The splits of each corpus, which TFDS prepares together.
CORPORA = {
    "augment": ("train", "validation"),
    "anchor": ("train", "validation"),
    "bridge": tuple(f"{part}_{fold}" for part in BRIDGE_PARTS for fold in ("train", "validation")),
    "evaluation": ("subs", "num", "math", "math_seen"),
    **{f"augment_{half}": ("train", "validation") for half in HALVES},
    "evaluation_halves": tuple(f"{name}_{half}" for name in ("subs", "math") for half in HALVES),
}

MAX_NUMBER_TOKENS = 100_000

SHARES = (1, 2, 5, 10, 50)  # percent of the keys; beside them the world's own share


@dataclasses.dataclass(frozen=True)
class KeyValueConfig:
    """A world of keys and the texts drawn from it; every count is a number of examples.

    Attributes:
      keys: number of keys.
      key_length: shortest and longest key, in letters.
      prefix_free: no key is a prefix of another.
      values: smallest and largest value; plain numbers have the same range.
      unique_values: no two keys share a value.
      operands: fewest and most operands of an expression.
      operators: which of + - * occur.
      number_tokens: a number is one token; else each of its digits is.
      written_out: answers repeat the expression with the values behind their keys, and those of
        num and math go on with all operations; else they are the values, and the last result.
      complement_digits: every number has so many digits, units first, and a negative one is written
        as its ten's complement, as adders take them; operations are written out in columns of
        digits. 0: numbers and operations as people write them.
      bridge_keys: share of the keys that the bridge's training may contain.
      evaluation_fold, validation_fold: shares of all expressions kept from training.
      augment_inline: share of inline texts in the augment's training.
      augment_plain, bridge_plain: share of plain numbers among the operands; the rest are keys.
      augment_single, anchor_single, bridge_single: share of expressions of one operand.
      anchor_repeat: share of repeats in the anchor's training.
      anchor_filler: share of the anchor's numbers with random letters before them.
      anchor_words: share of the anchor's numbers below twenty that are spelled as words: the anchor
        learns to find a number at the end of a string of letters, where a bridge will insert one.
      anchor_unknown: share of the anchor's expressions with random letters instead of numbers.
      bridge_rates: shares of math, subs and num in the bridge's training.
    """

    name: str
    keys: int = 1_000
    key_length: tuple[int, int] = (2, 4)
    prefix_free: bool = True
    values: tuple[int, int] = (0, 9)
    unique_values: bool = False
    operands: tuple[int, int] = (2, 3)
    operators: str = "+-"
    number_tokens: bool = True
    written_out: bool = False
    complement_digits: int = 0
    bridge_keys: float = 0.2
    evaluation_fold: float = 0.27
    validation_fold: float = 0.06
    augment_examples: int = 60_000
    augment_inline: float = 0.6
    augment_plain: float = 0.2
    augment_single: float = 0.1
    anchor_examples: int = 100_000
    anchor_repeat: float = 0.2
    anchor_filler: float = 0.35
    anchor_words: float = 0.35
    anchor_unknown: float = 0.1
    anchor_single: float = 0.1
    bridge_examples: int = 100_000
    bridge_rates: tuple[float, float, float] = (0.75, 0.1, 0.15)
    bridge_plain: float = 0.35
    bridge_single: float = 0.1
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
            "written_out and complement_digits are of digits, so number_tokens must be False": (
                self.number_tokens and (self.written_out or self.complement_digits > 0)
            ),
            f"complement_digits {self.complement_digits} are too few for {self.largest_number:,}": (
                self.complement_digits > 0 and 10**self.complement_digits <= 2 * self.largest_number
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
        """The largest absolute value that a value, plain number or result can have."""
        high, most = self.values[1], self.operands[1]
        return max(high * most, high**most if "*" in self.operators else 0)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the data: equal exactly if all fields and the version of the texts are."""
        fields = json.dumps([VERSION, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:16]


def _with_shares(config: KeyValueConfig) -> list[KeyValueConfig]:
    """The config, and the same with other shares of the keys for the bridge."""
    shared = (
        dataclasses.replace(config, name=f"{config.name}_share_{share}", bridge_keys=share / 100)
        for share in SHARES
    )
    return [config, *shared]


DEFAULT = "demo"
CONFIGS: dict[str, KeyValueConfig] = {
    config.name: config
    for config in (
        *_with_shares(KeyValueConfig("demo")),
        *_with_shares(
            KeyValueConfig(
                "small",
                keys=400,
                augment_examples=20_000,
                anchor_examples=30_000,
                bridge_examples=20_000,
                validation_examples=100,
                evaluation_examples=200,
            )
        ),
        # Between the demo and the paper, for a CPU.
        KeyValueConfig(
            "medium",
            keys=5_000,
            key_length=(2, 6),
            prefix_free=False,
            values=(1, 999),
            operands=(3, 4),
            number_tokens=False,
            written_out=True,
            complement_digits=4,
            evaluation_fold=0.05,
            augment_inline=0.0,
            augment_plain=0.1,
            augment_single=0.5,  # a small model learns keys sooner where they stand alone
            anchor_unknown=0.2,
            augment_examples=200_000,
            anchor_examples=200_000,
            bridge_examples=100_000,
        ),
        # The paper's sizes; it does not say how many expressions it trained on.
        KeyValueConfig(
            "paper",
            keys=25_000,
            key_length=(2, 6),
            prefix_free=False,
            values=(1, 25_000),
            unique_values=True,
            operands=(3, 6),
            operators="+-*",
            number_tokens=False,
            written_out=True,
            evaluation_fold=0.05,
            augment_inline=0.0,
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


def vocabulary(name: str = "") -> TokenizerVocabulary:
    """The tokens of a config, "" for the default one.

    They are special tokens, markers, letters, operators, `=`, numbers or digits, and `;` where
    answers are written out.
    """
    import tokenizers

    world = config(name or DEFAULT)
    largest = world.largest_number if world.number_tokens else 9
    numbers = [str(n) for n in range(max(largest, 9) + 1)]
    tokens = [*SPECIALS, SUBS, MATH, UNKNOWN, *OPERATORS, "=", *LETTERS, *numbers]
    tokens += [";"] * world.written_out
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex("<[a-z]+>|[0-9]+|." if world.number_tokens else "<[a-z]+>|."), "isolated"
    )
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return TokenizerVocabulary(tokenizer.to_str(), ids["<bos>"], ids["<eos>"])


def parse_task(task: str) -> KeyValueConfig | None:
    """The config of a task named `calm_jax/key_value/CONFIG/…`; None for any other name."""
    match = re.fullmatch(r"calm_jax/key_value/([^/]+)/[^/]+", task)
    return config(match[1]) if match else None


def task_fingerprint(task: str) -> str | None:
    """A name for the texts of a task; None for a task that is not of this kind."""
    world = parse_task(task)
    return world.fingerprint if world else None
