"""Scores against their definitions, computed another way."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_jax.errors import CalmError
from calm_jax.evaluation import metric_table, metrics


def score_test_bounds(correct: int, count: int) -> tuple[float, float]:
    """The shares that a score test at 5 % just does not reject, found by bisection."""
    found = correct / count

    def rejected(share: float) -> bool:
        return abs(found - share) > 1.959963984540054 * math.sqrt(share * (1 - share) / count)

    def bisect(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        return inside

    low = 0.0 if correct == 0 else bisect(found, 0.0)
    high = 1.0 if correct == count else bisect(found, 1.0)
    return 100 * low, 100 * high


@given(st.integers(1, 5_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_is_the_inverted_score_test(correct_count):
    low, high = metrics.wilson_interval(*correct_count)
    expected_low, expected_high = score_test_bounds(*correct_count)
    assert low == pytest.approx(expected_low, abs=1e-7)
    assert high == pytest.approx(expected_high, abs=1e-7)


@pytest.mark.parametrize("correct, count", [(0, 0), (-1, 3), (4, 3)])
def test_interval_refuses_impossible_counts(correct, count):
    with pytest.raises(CalmError, match=f"{correct} of {count}"):
        metrics.wilson_interval(correct, count)


@given(st.lists(st.sampled_from(["7", "-1", "12", " 7 "]), min_size=1))
def test_no_constant_answer_beats_the_best(targets):
    answer, percent = metrics.best_constant(targets)
    shares = [
        100 * sum(metrics.is_exact_match(guess, target) for target in targets) / len(targets)
        for guess in ("7", "-1", "12", "0")
    ]
    assert percent == pytest.approx(max(shares))
    assert sum(metrics.is_exact_match(answer, t) for t in targets) == round(
        percent * len(targets) / 100
    )


def test_best_constant_of_equals_is_the_first_in_order_of_text():
    assert metrics.best_constant(["b", "a", "b", "a", "c"]) == ("a", 40.0)


def test_exact_match_ignores_only_space_around():
    assert metrics.is_exact_match(" 12+7\n", "12+7")
    assert not metrics.is_exact_match("12 +7", "12+7")
    assert not metrics.is_exact_match("", "0")


def test_score_counts_what_is_marked_correct():
    said = [(True, "1"), (False, " "), (True, "2"), (True, "")]
    found = metrics.score({"correct": right, "prediction": text} for right, text in said)
    assert (found["exact_match"], found["count"], found["empty"]) == (75.0, 4, 2)
    assert metric_table.in_words(found).endswith("; 2 answers are empty")
    assert found["interval"] == list(metrics.wilson_interval(3, 4))


@pytest.mark.parametrize("function", [metrics.score, metrics.best_constant])
def test_nothing_has_no_score(function):
    with pytest.raises(CalmError, match="at least one"):
        function([])
