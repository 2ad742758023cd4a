"""The final number of an answer, against GSM8K's own rule and by hand."""

import os
import re
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_jax.evaluation.number_answers import final_number
from calm_jax.text_files import parse_json, read_lines

# Of openai/grade-school-math, dataset.py.
PUBLISHED = re.compile(r"#### (\-?[0-9\.\,]+)")


def published_rule(completion: str) -> str:
    match = PUBLISHED.search(completion)
    return match.group(1).strip().replace(",", "") if match else "[invalid]"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("so 3 + 4 = 7\n#### 7\n\nQuestion: 9", "7"),
        ("The answer is 12 eggs. Then 5 more", "12"),
        ("It costs $1,234.50 in all.", "1234.50"),
        ("18.", "18"),
        ("18.00 dollars", "18"),
        ("-5", "-5"),
        ("−5 °C", "-5"),
        ("7-5", "5"),
        ("the result of 10 - 4", "4"),
        ("1’000’000 Franken", "1000000"),
        ("12\u202f000 euros", "12000"),
        ("12,00,000 rupees", "1200000"),
        ("3,5 Liter", "3.5"),
        ("1,234 and 5,678", "5678"),
        ("1, 2, 3", "3"),
        ("১৮", "18"),
        ("คำตอบคือ ๑,๒๓๔", "1234"),
        ("答案是１２。", "12"),
        ("١٢٣٤٫٥", "1234.5"),
        ("50%", "50"),
        ("x2", "2"),
        ("20,", "20"),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none at all", "####", "The answer is unknown."])
def test_no_number(text):
    assert final_number(text) is None


@given(
    st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "${:,}", "{} apples", "{:,}.0"])
)
def test_however_it_is_written(number, form):
    assert final_number("It is " + form.format(number).replace("$-", "-$")) == number


def test_as_the_published_rule():
    if "CALM_TEST_DATA" not in os.environ:
        pytest.skip("CALM_TEST_DATA names no folder with published data sets")
    path = Path(os.environ["CALM_TEST_DATA"]) / "data/gsm8k/test.jsonl.gz"
    answers = [parse_json(line, path)["answer"] for line in read_lines(path)]
    changed = [re.sub(r"#### (\S+)$", r"#### \g<1>0", answer) for answer in answers[::3]]
    for wanted in answers:
        assert final_number(wanted) == Decimal(published_rule(wanted))
    verdicts = [0, 0]
    for said, wanted in zip([*answers, *changed], [*answers, *answers[::3]], strict=True):
        theirs = published_rule(said) == published_rule(wanted)
        assert (final_number(said) == final_number(wanted)) == theirs
        verdicts[theirs] += 1
    # A zero behind a zero changes nothing: 0 becomes 00 for neither rule.
    assert min(verdicts) > 400
