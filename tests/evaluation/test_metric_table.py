"""Metrics against the programs that define them, or by hand."""

import contextlib
import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from calm_jax.errors import CalmError
from calm_jax.evaluation import metric_table
from calm_jax.evaluation.smoothed_bleu import smoothed_bleu4

WANTED = ["The cat sat on the mat.", "A dog ran!", "Ein süßer Hund", "", "1, 2, 3"] * 5
SAID = ["The cat sat on a mat", "A dog ran!", "Der süße Hund bellt", "x", "1, 2"] * 5


def records(said=SAID, wanted=WANTED):
    pairs = zip(said, wanted, strict=True)
    return [{"prediction": a, "targets": b} for a, b in pairs]


@pytest.mark.parametrize(
    ("name", "flags", "signed"),
    [
        ("chrf1", ["-m", "chrf", "--chrf-beta", "1"], "chrF1 nrefs:1|case:mixed"),
        ("chrf2", ["-m", "chrf"], "chrF2 nrefs:1|case:mixed"),
        ("bleu", ["-m", "bleu", "--force"], "BLEU nrefs:1|case:mixed"),
    ],
)
def test_as_the_command_of_sacrebleu(name, flags, signed, tmp_path):
    files = [tmp_path / "wanted", tmp_path / "said"]
    for file, texts in zip(files, (WANTED, SAID), strict=True):
        file.write_text("".join(f"{text}\n" for text in texts))
    command = [sys.executable, "-m", "sacrebleu", files[0], "-i", files[1], *flags, "-w", "10"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(run.stdout)
    cell = metric_table.score(records(), [name])
    assert f"{cell[name]:.10f}" == f"{told['score']:.10f}"
    assert cell["signatures"][name].startswith(signed)
    # The signature is the command's, behind the name, which alone tells beta.
    assert cell["signatures"][name] == f"{told['name']} {told['signature']}"
    low, high = cell["interval"]
    assert low < cell[name] < high


@pytest.mark.parametrize("name", ["chrf1", "chrf2", "bleu"])
def test_one_answer_that_is_not_all_wrong(name):
    """sacrebleu's own bootstrap fails here: some of its resamples have nothing right."""
    cell = metric_table.score(
        records(["", "", "", "a cat sat down there"], ["it sat there"] * 4), [name]
    )
    low, high = cell["interval"]
    assert low <= cell[name] <= high and (cell[name] > 0 or name == "bleu")


def test_smoothed_bleu_as_the_evaluator_of_codexglue():
    """Values of its evaluator.py for the same lines."""
    pairs = [
        ("Returns the sum of two numbers .", "Return the sum of two numbers"),
        ("Sets the user's name (if any).", "set the user 's name , if any"),
        ("Get value", "Removes all items from the list"),
        ("a b c d e f", "a b c d e f"),
        ("parse 3.5 e-3", ""),
    ]
    expected = [69.64743404143488, 47.269442068339785, 2.357778394613524e-76, 100.0,
                0.09118819655545163]  # fmt: skip
    found = [100 * smoothed_bleu4(*pair) for pair in pairs]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    cell = metric_table.score(
        [{"targets": a, "prediction": b} for a, b in pairs], ["smoothed_bleu4"]
    )
    assert cell["smoothed_bleu4"] == pytest.approx(np.mean(expected), rel=1e-12)


@pytest.mark.parametrize(("count", "right", "k"), [(10, 3, 1), (10, 3, 5), (5, 0, 2), (4, 4, 4)])
def test_pass_at_k_is_the_share_of_all_draws(count, right, k):
    outcomes = [True] * right + [False] * (count - right)
    draws = [
        any(outcomes[i] for i in range(count) if mask >> i & 1)
        for mask in range(2**count)
        if mask.bit_count() == k
    ]
    assert metric_table.pass_at_k(count, right, k) == pytest.approx(np.mean(draws), abs=1e-12)


def test_pass_at_k_of_records():
    passed = [[True, False, False, False], [False] * 4, [True, True, False, False]]
    cell = metric_table.score(
        [{"passed": one, "prediction": "x"} for one in passed], ["pass@1", "pass@2"]
    )
    assert cell["pass@1"] == pytest.approx(100 * (1 / 4 + 0 + 2 / 4) / 3)
    assert cell["pass@2"] == pytest.approx(100 * (3 / 6 + 0 + 5 / 6) / 3)
    assert cell["interval"][0] < cell["pass@1"] < cell["interval"][1]
    with pytest.raises(CalmError, match="pass@10 needs 10 answers to each problem, not 4"):
        metric_table.score([{"passed": passed[0], "prediction": "x"}], ["pass@10"])


def test_choices():
    one = {"choices": ["a", "much longer"], "logprobs": [-2.0, -11.0], "answer": 1}
    cell = metric_table.score([one], ["accuracy", "accuracy_normalized"])
    assert cell["accuracy"] == 0 and cell["accuracy_normalized"] == 100


def test_bits_per_byte_is_that_of_all_bytes():
    said = [{"logprob": -10 * math.log(2), "bytes": 4}, {"logprob": -2 * math.log(2), "bytes": 20}]
    cell = metric_table.score(said, ["bits_per_byte"])
    assert cell["bits_per_byte"] == pytest.approx(12 / 24)
    assert cell["interval"] == pytest.approx([2 / 20, 10 / 4])
    assert "empty" not in cell


@pytest.mark.parametrize(
    ("name", "said", "wanted", "right"),
    [
        ("contains", "It is Paris, I think", " paris", True),
        ("contains", "Par is", "Paris", False),
        ("number", "That makes 1,200 in all", "1200", True),
        ("number", "none", "1200", False),
        ("regex", "colour: grey", "gr[ae]y$", True),
        ("regex", "grey one", "gr[ae]y$", False),
        ("exact_match", " a ", "a", True),
        ("exact_match", "A", "a", False),
    ],
)
def test_right_and_wrong(name, said, wanted, right):
    one = {"prediction": said, "targets": wanted}
    assert metric_table.find(name).judge(one) == right
    cell = metric_table.score([one], [name])
    assert cell[name] == 100 * right
    assert cell["interval"][0] <= cell[name] <= cell["interval"][1]


def test_the_form_of_seqio():
    found = metric_table.seqio_metric("chrf1")(WANTED, SAID)
    expected = CHRF(beta=1).corpus_score(SAID, [[w.strip() for w in WANTED]]).score
    assert found == {"chrf1": pytest.approx(expected)}
    assert metric_table.seqio_metric("exact_match")(["a", "b"], ["a", "c"]) == {"exact_match": 50.0}


def test_intervals_are_the_same_each_time_and_narrow_with_more_records():
    first = metric_table.score(records(), ["smoothed_bleu4"])
    assert metric_table.score(records(), ["smoothed_bleu4"]) == first
    more = metric_table.score(records() * 16, ["smoothed_bleu4"])
    widths = [cell["interval"][1] - cell["interval"][0] for cell in (first, more)]
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.2)


@pytest.mark.parametrize(
    ("said", "names", "message"),
    [
        ([], ["chrf1"], "chrf1 needs at least one prediction"),
        (records(), ["rouge"], "there is no metric 'rouge'; there are exact_match, contains"),
        ([{"prediction": "1", "targets": "no"}], ["number"], "the target 'no' has no number"),
        ([{"prediction": "1", "targets": "("}], ["regex"], r"the target '\(' is none: missing"),
    ],
)
def test_refusals(said, names, message):
    with pytest.raises(CalmError, match=message), contextlib.redirect_stdout(io.StringIO()):
        metric_table.score(said, names)
