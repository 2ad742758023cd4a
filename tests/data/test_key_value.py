"""Every number is checked by Python's own arithmetic, every share by counting texts."""

import ast
import collections
import dataclasses
import functools
import itertools
import re

import pytest

from calm_jax.data import key_value
from calm_jax.data.key_value import CORPORA, KeyValueConfig
from calm_jax.data.key_value_world import World
from calm_jax.errors import CalmError

SMALL = KeyValueConfig(
    "small", keys=300, augment_examples=4000, anchor_examples=4000, bridge_examples=6000
)
PAPER = dataclasses.replace(
    key_value.CONFIGS["paper"],
    name="paper_small",
    augment_examples=1500,
    anchor_examples=1500,
    bridge_examples=1500,
    evaluation_examples=300,
)
DIGITS = dataclasses.replace(
    SMALL,
    name="digits",
    values=(1, 99),
    number_tokens=False,
    written_out=True,
    complement_digits=3,
)
WORLDS = [SMALL, PAPER, DIGITS, key_value.CONFIGS["tiny"]]

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS += ["eleven", "twelve", *(f"{n}teen" for n in ("thir", "four", "fif", "six", "seven"))]
WORDS += ["eighteen", "nineteen"]

TRAINING = [(corpus, split) for corpus in CORPORA for split in CORPORA[corpus] if "train" in split]
SCORED = [(corpus, split) for corpus in CORPORA for split in CORPORA[corpus] if "eval" in corpus]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda config: config.name)
def world(request):
    return World(request.param)


@pytest.fixture(scope="module")
def texts(world):
    return {
        (corpus, split): list(world.examples(corpus, split))
        for corpus, splits in CORPORA.items()
        for split in splits
    }


def body(example: dict) -> str:
    """The expression of an example, as it is written."""
    text = example["targets"] if example["set"] == "inline" else example["inputs"]
    return re.sub(r"<[a-z]+>|=", "", text)


def operands(expression: str) -> list[str]:
    return re.split(r"[+*-]", expression)


@functools.cache  # the paper's world has so many keys that to copy them takes longer than all else
def values_of(world: World) -> dict[str, int]:
    """The number that each key and word stands for."""
    values = dict(zip(world.keys, world.values.tolist(), strict=True))
    return values | {word: n for n, word in enumerate(WORDS)}


def substituted(world: World, expression: str) -> str:
    """The expression with a number for each operand: a key's value, a word's, or what stands."""
    values = values_of(world)

    def number(operand: re.Match) -> str:
        digits = re.sub("[a-z]", "", operand[0])
        return digits or numeral(world.config, values.get(operand[0], "?"))

    return re.sub("[a-z0-9]+", number, expression)


def evaluated(expression: str) -> int:
    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        left, right = value(node.left), value(node.right)
        return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]

    return value(ast.parse(expression, mode="eval").body)


def numeral(config: KeyValueConfig, value: int | str) -> str:
    digits = config.complement_digits
    return str(value) if value == "?" or not digits else f"{value:0{digits}}"[::-1]


def natural(config: KeyValueConfig, text: str) -> str:
    """The text with every number as Python writes it."""
    digits = config.complement_digits

    def number(found: re.Match) -> str:
        value = int(found[0][::-1])
        return str(value - 10**digits if value >= 10**digits / 2 else value)

    return re.sub("[0-9]+", number, text) if digits else text


def in_rows(config: KeyValueConfig, answer: str) -> str:
    """An answer in columns as one without: `+279101-936101` is `21+70=91-30=61`."""
    if not config.complement_digits or answer[0] not in "+-":
        return answer
    rows = ""
    for operator, columns in re.findall("([+-])([0-9]+)", answer):
        first, second, result = (columns[place::3] for place in range(3))
        assert len(columns) == 3 * config.complement_digits
        assert not rows or rows.endswith(f"={first}")
        rows = f"{rows or first}{operator}{second}={result}"
    return rows


def lines_of(config: KeyValueConfig, answer: str) -> list[list[str]]:
    """What stands between `;` and between `=` of an answer that is written out."""
    return [line.split("=") for line in natural(config, in_rows(config, answer)).split(";")]


def check_form(config: KeyValueConfig, answer: str, numbers: str) -> None:
    """One operation a step, as many as the expression has, with its operands."""
    lines = lines_of(config, answer)
    steps = [operation for line in lines for operation in line[:-1]]
    signs = [re.findall("(?<=[0-9])[+*-]", operation) for operation in steps]
    assert [len(one) for one in signs] == [1] * (len(operands(numbers)) - 1)
    asked = natural(config, numbers)
    assert sorted(itertools.chain(*signs)) == sorted(re.findall("[+*-]", asked))
    answer = in_rows(config, answer)
    used = collections.Counter(re.findall("[0-9]+", natural(config, answer)))
    assert collections.Counter(operands(asked)) <= used
    if "*" not in numbers:
        assert re.sub("=-?[0-9]+", "", natural(config, answer)) == asked


def check_answer(config: KeyValueConfig, answer: str, numbers: str) -> None:
    *_, last = lines_of(config, answer)
    assert str(evaluated(natural(config, numbers))) == last[-1]
    if config.written_out:
        check_form(config, answer, numbers)
        for line in lines_of(config, answer):
            for operation, after in itertools.pairwise(line):
                assert re.match("-?[0-9]+", after)[0] == str(evaluated(operation))


def check_substituted(world: World, expression: str, answer: str) -> str:
    """Checks that each value is there, behind its name in a world that writes out; in numbers."""
    if not world.config.written_out:
        assert answer == substituted(world, expression)
        return answer
    assert re.findall("[+*-]", answer) == re.findall("[+*-]", expression)
    for asked, written in zip(operands(expression), operands(answer), strict=True):
        if not asked.isalpha():
            assert written == asked
        elif asked in values_of(world):
            assert written == asked + substituted(world, asked)
        else:
            assert re.fullmatch(rf"{asked}([0-9]+|\?)", written)
    return re.sub("[a-z]", "", answer)


def test_answers_are_right(world, texts):
    written_out = world.config.written_out
    for (corpus, _), examples in texts.items():
        for example in examples:
            expression, answer = body(example), example["targets"]
            numbers = substituted(world, expression)
            is_half = corpus in ("augment_first", "augment_second")
            guessed = ("unknown", "repeat") if written_out else ("unknown",)
            assert is_half or "?" not in numbers or example["set"] in guessed
            assert example["set"] != "unknown" or "?" in numbers
            match example["set"]:
                case "math" | "num" | "unknown" if written_out:
                    assert example["inputs"].startswith(key_value.MATH)
                    written, _, calculated = answer.partition("=")
                    check_answer(
                        world.config, calculated, check_substituted(world, expression, written)
                    )
                case "math" | "num":
                    assert example["inputs"].startswith(key_value.MATH)
                    check_answer(world.config, answer, numbers)
                case "subs" | "repeat":
                    is_math = example["inputs"].startswith(key_value.MATH)
                    assert not is_math or (written_out and corpus.startswith("augment"))
                    assert answer.endswith("=") == is_math
                    written = check_substituted(world, expression, answer.removesuffix("="))
                    assert is_half or "?" not in written
                case "unknown":
                    assert answer == "?"
                case "inline":
                    keyed = [o for o in operands(expression) if o[0].isalpha()]
                    assert keyed
                    for operand in keyed:
                        key = re.match("[a-z]+", operand)[0]
                        assert operand == key + substituted(world, key)
                case other:
                    raise AssertionError(other)
            assert example["operands"] == len(operands(expression))


def test_a_half_knows_its_own_keys_alone():
    world = World(DIGITS)
    halves = dict(zip(world.keys, world.half, strict=True))
    for half in key_value.HALVES:
        for example in world.examples(f"augment_{half}", "train"):
            for asked in operands(body(example)):
                mine = halves.get(asked) == half
                assert not asked.isalpha() or (f"{asked}?" in example["targets"]) != mine


def test_keys_and_values(world):
    config = world.config
    assert len(set(world.keys)) == config.keys
    assert {len(key) for key in world.keys} == set(
        range(config.key_length[0], config.key_length[1] + 1)
    )
    assert all(re.fullmatch("[a-z]+", key) for key in world.keys)
    assert config.values[0] <= world.values.min() and world.values.max() <= config.values[1]
    if config.unique_values:
        assert len(set(world.values.tolist())) == config.keys
    assert world.seen.sum() == round(0.2 * config.keys)


def test_no_unseen_key_is_in_the_bridges_training(world, texts):
    seen = {key for key, is_seen in zip(world.keys, world.seen, strict=True) if is_seen}
    for split in CORPORA["bridge"]:
        used = {o for e in texts["bridge", split] for o in operands(body(e)) if o[0].isalpha()}
        assert used <= seen
        assert used or split.startswith("num")
    for example in texts["evaluation", "math"] + texts["evaluation", "subs"]:
        assert not set(operands(body(example))) & seen
        assert example["unseen"]
    for example in texts["evaluation", "math_seen"]:
        assert set(operands(body(example))) <= seen
        assert not example["unseen"]


def test_the_anchor_has_met_no_key(world, texts):
    for name in CORPORA["anchor"]:
        letters = {re.sub("[0-9]", "", o) for e in texts["anchor", name] for o in operands(body(e))}
        assert letters - {""}
        assert not letters & set(world.keys)


def test_no_key_is_the_start_of_another_where_that_is_asked(world):
    starts = {key[:end] for key in world.keys for end in range(1, len(key))}
    assert bool(starts & set(world.keys)) != world.config.prefix_free


def test_unseen_says_that_there_are_keys_and_none_is_the_bridges(world, texts):
    seen = {key for key, is_seen in zip(world.keys, world.seen, strict=True) if is_seen}
    every_key = set(world.keys)
    for corpus in ("augment", "augment_first", "augment_second"):
        for example in texts[corpus, "train"]:
            keys = {re.match("[a-z]*", o)[0] for o in operands(body(example))} & every_key
            assert example["unseen"] == (bool(keys) and not keys & seen)


def test_an_augment_of_one_half_meets_no_key_of_the_other(world, texts):
    """And what it meets that is no key of its own it has to call unknown, and can tell so."""
    middle, every_key = world.config.keys // 2, set(world.keys)
    halves = {"first": {*world.keys[:middle]}, "second": {*world.keys[middle:]}}
    seen = {key for key, is_seen in zip(world.keys, world.seen, strict=True) if is_seen}
    for half, own in halves.items():
        met, strangers = set(), set()
        for fold in CORPORA[f"augment_{half}"]:
            for example in texts[f"augment_{half}", fold]:
                letters = {re.sub("[0-9?]", "", o) for o in operands(body(example))} - {""}
                met |= letters & every_key
                strangers |= letters - every_key
                assert ("?" in example["targets"]) == bool(letters - own)
        assert met and strangers and met <= own
        assert not {s for s in strangers if any(s[:end] in own for end in range(1, len(s)))}
        for name in ("subs", "math"):
            examples = texts["evaluation_halves", f"{name}_{half}"]
            assert {o for e in examples for o in operands(body(e))} <= own - seen


def test_no_evaluated_expression_was_ever_trained_on(world, texts):
    """Neither as it is written, nor in numbers where the numbers are what is evaluated."""
    written, in_numbers = set(), set()
    for name in TRAINING:
        for example in texts[name]:
            expression = body(example)
            in_numbers.add(substituted(world, expression))
            # Without filler letters and inline values: the expression they were made from.
            bare = [re.sub("[a-z]", "", o) or o for o in operands(expression)]
            keys = [re.sub("[0-9]", "", o) or o for o in operands(expression)]
            for names in (operands(expression), bare, keys):
                operators = re.findall("[+*-]", expression)
                pairs = itertools.zip_longest(names, operators, fillvalue="")
                written.add("".join(itertools.chain(*pairs)))
    for name in SCORED:
        evaluated_bodies = [body(example) for example in texts[name]]
        assert not set(evaluated_bodies) & written
        assert len(set(evaluated_bodies)) == len(evaluated_bodies) == len(texts[name])
    assert not {body(e) for e in texts["evaluation", "num"]} & in_numbers


def is_known(world: World, expression: str) -> bool:
    return all(o in values_of(world) or not o.isalpha() for o in operands(expression))


def test_validation_is_of_neither(world, texts):
    training = {body(e) for name in TRAINING for e in texts[name]}
    scored = {body(e) for name in SCORED for e in texts[name]}
    for corpus, splits in CORPORA.items():
        for split in splits:
            if "validation" in split:
                # Letters that say nothing stand in for keys after the dealing.
                known = {body(e) for e in texts[corpus, split] if is_known(world, body(e))}
                assert known and not known & (training | scored)


def test_shares_are_those_of_the_config():
    world = World(SMALL)
    augment = list(world.examples("augment", "train"))
    anchor = list(world.examples("anchor", "train"))
    bridge = list(world.examples("bridge", "math_train"))
    inline = sum(e["set"] == "inline" for e in augment) / len(augment)
    repeat = sum(e["set"] == "repeat" for e in anchor) / len(anchor)
    unknown = sum(e["set"] == "unknown" for e in anchor) / len(anchor)
    known = [o for e in anchor if e["set"] != "unknown" for o in operands(body(e))]
    words = sum(o in WORDS for o in known) / len(known)
    filler = sum(bool(re.fullmatch("[a-z]+[0-9]+", o)) for o in known) / len(known)
    single = sum(e["operands"] == 1 for e in bridge) / len(bridge)
    assert inline == pytest.approx(SMALL.augment_inline, abs=0.04)
    assert repeat == pytest.approx(SMALL.anchor_repeat * (1 - SMALL.anchor_unknown), abs=0.04)
    assert unknown == pytest.approx(SMALL.anchor_unknown, abs=0.03)
    assert words == pytest.approx(SMALL.anchor_words, abs=0.03)
    assert filler == pytest.approx(SMALL.anchor_filler * (1 - SMALL.anchor_words), abs=0.03)
    assert single == pytest.approx(SMALL.bridge_single, abs=0.03)
    assert len(bridge) == round(SMALL.bridge_examples * SMALL.bridge_rates[0])
    assert {e["operands"] for e in augment} == {1, 2, 3}


def test_a_world_is_always_the_same_and_seeds_differ():
    again, other = World(SMALL), World(dataclasses.replace(SMALL, seed=1))
    for corpus, split in (("augment", "train"), ("evaluation", "math")):
        first = list(World(SMALL).examples(corpus, split))
        assert first == list(again.examples(corpus, split))
        assert first != list(other.examples(corpus, split))


def test_every_text_is_in_the_vocabulary(world, texts, monkeypatch):
    monkeypatch.setitem(key_value.CONFIGS, world.config.name, world.config)
    vocabulary = key_value.vocabulary(world.config.name)
    unknown = vocabulary.encode("€")[0]
    for example in itertools.chain(*texts.values()):
        for text in (example["inputs"], example["targets"]):
            ids = vocabulary.encode(text)
            assert unknown not in ids
            assert vocabulary.decode(ids) == text


def test_numbers_are_one_token_or_digits():
    text = "<math>ab+19="
    assert len(key_value.vocabulary("tiny").encode(text)) == 6
    assert len(key_value.vocabulary("paper").encode(text)) == 7


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"keys": 9, "unique_values": True, "values": (1, 8)}, "9 keys"),
        ({"keys": 700, "key_length": (2, 2)}, "700 keys"),
        ({"values": (-1, 3)}, "values"),
        ({"operators": "+/"}, "operators"),
        ({"operands": (1, 3)}, "operands"),
        ({"values": (1, 60_000)}, "number_tokens"),
        ({"written_out": True}, "written_out"),
        ({"complement_digits": 2}, "complement_digits"),
        ({"complement_digits": 2, "number_tokens": False, "values": (0, 20)}, "too few for 60"),
        ({"bridge_rates": (0.5, 0.2, 0.2)}, "bridge_rates"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, part):
    with pytest.raises(CalmError, match=f"'wrong'.*{part}"):
        KeyValueConfig("wrong", **changes)


def test_more_expressions_than_there_are_is_an_error_with_both_numbers():
    small = KeyValueConfig("few", operands=(2, 2), evaluation_examples=500)
    with pytest.raises(CalmError, match=r"500 different .* only [0-9]+ were found"):
        list(World(small).examples("evaluation", "num"))


def test_what_the_largest_share_leaves_out_is_unseen_at_every_share():
    worlds = [
        World(key_value.CONFIGS["demo" if share == 20 else f"demo_share_{share}"])
        for share in sorted((*key_value.SHARES, 20))
    ]
    largest, met = worlds[-1], set()
    for world, share in zip(worlds, (1, 2, 5, 10, 20, 50), strict=True):
        assert world.keys == largest.keys and (world.values == largest.values).all()
        texts = [one["inputs"] for one in world.examples("bridge", "math_validation")]
        keys = {key for text in texts for key in re.findall("[a-z]+", text.removeprefix("<math>"))}
        assert keys <= {*world.keys} and len(keys) <= 10 * share  # of 1,000
        met |= keys
    assert len(met) > 250
    asked = [one for name in ("math", "subs") for one in largest.examples("evaluation", name)]
    for one in asked:
        keys = re.findall("[a-z]+", one["inputs"].partition(">")[2])
        assert one["unseen"] and keys and met.isdisjoint(keys)
