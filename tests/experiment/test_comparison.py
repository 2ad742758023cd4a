"""Means, differences and intervals, against the same done with plain loops."""

import numpy as np
import pytest
from etils import epath
from made_runs import random_rights, scored

from calm_jax.errors import CalmError
from calm_jax.evaluation import metric_table
from calm_jax.experiment.arms import Arm, Experiment, jobs
from calm_jax.experiment.comparison import compare

ARMS = (
    Arm("anchor", kind="part", seeded=False),
    Arm("calm", kind="calm", anchor="anchor", augments=("anchor",)),
    Arm("zeroed", scored_from="calm", kind="control"),
)


def written(folder, rights, metric="exact_match", texts=None):
    """The jobs of an experiment whose predictions are right where `rights` [N] of an arm says."""
    experiment = Experiment("t", ARMS, ("task",), "calm", seeds=(0, 1))
    found = list(jobs(experiment, "f.py", epath.Path(folder), {}))
    for job in found:
        right = rights.get((job.arm.name, job.seed if job.arm.seeded else None))
        if right is not None:
            scored(job, {"task": right}, metric, texts)
    return {row.arm.name: row for row in compare(experiment, found)}


def test_means_and_differences(tmp_path):
    rights = {
        ("anchor", None): random_rights(0, 0.3),
        ("calm", 0): random_rights(1, 0.9),
        ("calm", 1): random_rights(2, 0.8),
        ("zeroed", 0): random_rights(3, 0.3),
        ("zeroed", 1): random_rights(4, 0.3),
    }
    rows = written(tmp_path, rights)
    shares = {key: 100 * right.mean() for key, right in rights.items()}
    calm, anchor, zeroed = (rows[name].cells["task"] for name in ("calm", "anchor", "zeroed"))
    assert calm.values == pytest.approx((shares["calm", 0], shares["calm", 1]))
    assert calm.mean == pytest.approx(np.mean(calm.values))
    assert (calm.difference, calm.verdict) == (None, "")
    assert anchor.values == pytest.approx((shares["anchor", None],))
    # An arm without seeds is compared with each seed of the reference.
    assert anchor.difference == pytest.approx(shares["anchor", None] - calm.mean)
    assert zeroed.difference == pytest.approx(zeroed.mean - calm.mean)
    for cell in (anchor, zeroed):
        assert cell.verdict == "worse"
        low, high = cell.difference_interval
        assert low < cell.difference < high < 0
    # Between seeds of 90 % and 80 % the interval must at least span both.
    low, high = calm.interval
    assert low < shares["calm", 1] + 1 and high > shares["calm", 0] - 1


def test_the_interval_of_one_seed_is_that_of_the_binomial(tmp_path):
    """95 % of intervals of a share hold it: here their width is compared with the formula's."""
    rights = {("calm", 0): random_rights(7, 0.7, 2000)}
    low, high = written(tmp_path, rights)["calm"].cells["task"].interval
    share = rights["calm", 0].mean()
    expected = 2 * 1.96 * 100 * np.sqrt(share * (1 - share) / 2000)
    assert high - low == pytest.approx(expected, rel=0.1)


def test_equal_answers_are_even_and_pairs_are_paired(tmp_path):
    """The same examples wrong in both: the difference has no spread, though the scores have."""
    right = random_rights(1, 0.5)
    same = {("calm", 0): right, ("zeroed", 0): right}
    cell = written(tmp_path / "same", same)["zeroed"].cells["task"]
    assert (cell.difference, cell.difference_interval, cell.verdict) == (0, (0, 0), "even")
    fewer = right.copy()
    fewer[np.flatnonzero(right)[:10]] = False
    pairs = {("calm", 0): right, ("zeroed", 0): fewer}
    cell = written(tmp_path / "fewer", pairs)["zeroed"].cells["task"]
    assert cell.difference == pytest.approx(-100 * 10 / 200)
    low, high = cell.difference_interval
    assert high < 0 and high - low < 8  # unpaired it would be nearly 20


@pytest.mark.parametrize("metric", ["chrf1", "bleu"])
def test_corpus_metrics_are_resampled_as_corpora(tmp_path, metric):
    texts = {True: "the right one", False: "this one is all wrong"}
    rights = {("calm", 0): random_rights(1, 0.8, 60), ("zeroed", 0): random_rights(2, 0.4, 60)}
    rows = written(tmp_path, rights, metric, texts)
    calm, zeroed = (rows[name].cells["task"] for name in ("calm", "zeroed"))
    for name, cell in (("calm", calm), ("zeroed", zeroed)):
        low, high = cell.interval
        assert low < cell.mean < high
        records = [
            {"targets": "the right one", "prediction": texts[bool(x)]} for x in rights[name, 0]
        ]
        own = metric_table.find(metric).score(records)
        assert cell.mean == pytest.approx(own.value)
        assert cell.interval == pytest.approx(own.interval, abs=4)  # sacrebleu's own, symmetric
    assert zeroed.verdict == "worse"


def test_other_examples_are_not_compared(tmp_path):
    rights = {("calm", 0): random_rights(1, 0.5, 20), ("zeroed", 0): random_rights(1, 0.5, 21)}
    cell = written(tmp_path / "arms", rights)["zeroed"].cells["task"]
    assert (cell.difference, cell.verdict) == (None, "")
    rights = {("calm", 0): random_rights(1, 0.5, 20), ("calm", 1): random_rights(1, 0.5, 21)}
    with pytest.raises(CalmError, match="task: the seeds of calm were scored on different"):
        written(tmp_path / "seeds", rights)


@pytest.mark.parametrize(("first", "second"), [("exact_match", "chrf1"), ("chrf1", "exact_match")])
def test_other_metrics_are_not_compared(tmp_path, first, second):
    experiment = Experiment("t", ARMS, ("task",), "calm")
    found = {job.arm.name: job for job in jobs(experiment, "f.py", epath.Path(tmp_path), {})}
    for name, metric in (("calm", first), ("zeroed", second)):
        scored(found[name], {"task": random_rights(1, 0.5, 20)}, metric)
    rows = {row.arm.name: row for row in compare(experiment, list(found.values()))}
    cell = rows["zeroed"].cells["task"]
    assert (cell.metric, cell.difference, cell.verdict) == (second, None, "")


def test_arms_without_scores_have_no_cells(tmp_path):
    rows = written(tmp_path, {("anchor", None): random_rights(0, 0.5)})
    assert rows["calm"].cells == {} and rows["anchor"].cells["task"].difference is None
