"""The metrics that tasks are scored by, by name: every score is one of stored predictions.

A metric scores records. A record has "targets", the right answer, and "prediction", what the model
said; for some metrics more, which their function names. `seqio_metric` gives a metric in the form
of seqio's Tasks.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from calm_jax.errors import CalmError
from calm_jax.evaluation import metrics
from calm_jax.evaluation.number_answers import final_number
from calm_jax.evaluation.smoothed_bleu import smoothed_bleu4

RESAMPLES = 1000  # of the records, for an interval by bootstrap
_SEED = 12345  # of the resamples; sacrebleu's own
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Score:
    """A value with its 95 % interval, and what sacrebleu's signature says of how it was made."""

    value: float
    interval: tuple[float, float]
    signature: str | None = None


@dataclasses.dataclass(frozen=True)
class Sums:
    """A score as a function of sums over records, by which records are resampled."""

    of_records: Callable[[Sequence[Record]], np.ndarray]  # K numbers for each of N, float64 [N, K]
    value: Callable[[np.ndarray], np.ndarray]  # the scores [R] of R sums of them, [R, K]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A score of records."""

    name: str
    score: Callable[[Sequence[Record]], Score]
    sums: Sums
    judge: Callable[[Record], bool] | None = None  # of metrics that find each right or wrong
    unit: str = ""  # behind the value
    descends: bool = False  # whether less is better

    @property
    def digits(self) -> int:
        """Decimals of a value that is shown."""
        return 3 if self.descends else 1


def find(name: str) -> Metric:
    """The metric of this name; pass@K for every K. Raises `CalmError` for another name."""
    if found := re.fullmatch(r"pass@([1-9]\d*)", name):
        return _pass_at(int(found[1]))
    if name not in METRICS:
        raise CalmError(f"there is no metric {name!r}; there are {', '.join(METRICS)}, pass@K")
    return METRICS[name]


def score(records: Sequence[Record], names: Sequence[str]) -> dict[str, Any]:
    """The scores of a task's records by these metrics, the main one first.

    Returns:
        a value for each metric by its name, "metric", the name of the main one, "interval", its
        95 % interval, "intervals" of all by name, "signatures" of those that have one, "count"
        and, of generated answers, "empty".

    Raises:
        CalmError: there are no records.
    """
    if not records:
        raise CalmError(f"{names[0]} needs at least one prediction")
    found = {name: find(name).score(records) for name in names}
    cell: dict[str, Any] = {name: one.value for name, one in found.items()}
    cell |= {"metric": names[0], "count": len(records)}
    if "prediction" in records[0]:
        cell["empty"] = sum(not record["prediction"].strip() for record in records)
    if rewritten := sum("written" in record for record in records):
        cell["rewritten"] = rewritten
    cell["interval"] = list(found[names[0]].interval)
    cell["intervals"] = {name: list(one.interval) for name, one in found.items()}
    signatures = {name: one.signature for name, one in found.items() if one.signature}
    return cell | ({"signatures": signatures} if signatures else {})


def main_value(cell: Mapping[str, Any]) -> float:
    """The value of a cell's main metric; if the cell names none, it is exact match."""
    return cell[main_name(cell)]


def main_name(cell: Mapping[str, Any]) -> str:
    return cell.get("metric", "exact_match")


def in_words(cell: Mapping[str, Any]) -> str:
    """A result of `score` as one line."""
    name, (low, high) = main_name(cell), cell["interval"]
    metric, value = find(name), main_value(cell)
    digits = metric.digits
    if metric.unit:
        told = "" if name == "exact_match" else f"{name} "
        words = f"{told}{value:.1f}% of {cell['count']:,}"
    else:
        words = f"{name} {value:.{digits}f} over {cell['count']:,}"
    words += f" (95% interval {low:.{digits}f}–{high:.{digits}f})"
    for other in cell.get("intervals", {}):
        if other != name:
            words += f"; {other} {cell[other]:.1f}{find(other).unit}"
    if cell.get("empty"):
        words += f"; {cell['empty']:,} answers are empty"
    if cell.get("rewritten"):
        words += f"; {cell['rewritten']:,} targets are scored as the vocabulary writes them"
    return words


def seqio_metric(name: str) -> Callable[[Sequence[str], Sequence[str]], dict[str, float]]:
    """The metric as seqio calls it, for a Task's `metric_fns`: of texts alone."""
    metric = find(name)

    def compute(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        pairs = zip(targets, predictions, strict=True)
        records = [{"targets": target, "prediction": said} for target, said in pairs]
        return {name: metric.score(records).value}

    compute.__name__ = name
    return compute


def _bootstrapped(sums: Sums) -> Callable[[Sequence[Record]], Score]:
    """The score of all records, and its 95 % interval by resampling records."""

    def score(records: Sequence[Record]) -> Score:
        values_NK = sums.of_records(records)
        random, N = np.random.default_rng(_SEED), len(values_NK)
        counts_RN = random.multinomial(N, np.full(N, 1 / N), size=RESAMPLES)
        low, high = np.quantile(sums.value(counts_RN @ values_NK), (0.025, 0.975))
        return Score(float(sums.value(values_NK.sum(0)[None])[0]), (float(low), float(high)))

    return score


def _ratio(of_records: Callable[[Sequence[Record]], Sequence[tuple[float, float]]]) -> Sums:
    """The ratio of two sums, of which every record has a pair."""
    return Sums(
        lambda records: np.array(of_records(records), np.float64),
        lambda sums_R2: sums_R2[:, 0] / sums_R2[:, 1],
    )


def _mean_of(each: Callable[[Record], float]) -> Sums:
    """The mean of a number of each record, in percent."""
    return _ratio(lambda records: [(100 * float(each(record)), 1) for record in records])


def _share(judge: Callable[[Record], bool]) -> Callable[[Sequence[Record]], Score]:
    def score(records: Sequence[Record]) -> Score:
        right = sum(map(judge, records))
        low_high = metrics.wilson_interval(right, len(records))
        return Score(100 * right / len(records), low_high)

    return score


def _is_exact(record: Record) -> bool:
    targets = [record[key] for key in ("targets", "written") if key in record]
    return any(metrics.is_exact_match(record["prediction"], target) for target in targets)


def _contains(record: Record) -> bool:
    """Whether the answer contains the target, in upper or lower case."""
    return record["targets"].strip().casefold() in record["prediction"].casefold()


def _is_number(record: Record) -> bool:
    """Whether both texts end in the same number."""
    wanted = final_number(record["targets"])
    if wanted is None:
        raise CalmError(f"the metric number: the target {record['targets']!r} has no number")
    return wanted == final_number(record["prediction"])


def _matches(record: Record) -> bool:
    """Whether the target, a regular expression, is found in the answer."""
    try:
        return re.search(record["targets"], record["prediction"]) is not None
    except re.error as error:
        raise CalmError(
            f"the metric regex: the target {record['targets']!r} is none: {error}"
        ) from None


def _is_chosen(record: Record) -> bool:
    """Whether the right choice, number "answer", is the most probable of "logprobs"."""
    return int(np.argmax(record["logprobs"])) == record["answer"]


def _is_chosen_normalized(record: Record) -> bool:
    """The same, with each log-probability divided by its choice's number of characters."""
    lengths = [len(choice) for choice in record["choices"]]
    return int(np.argmax(np.array(record["logprobs"]) / lengths)) == record["answer"]


def _passed(record: Record) -> bool:
    """Whether the first answer passed, of "passed", a bool for each."""
    return record["passed"][0]


def pass_at_k(count: int, right: int, k: int) -> float:
    """The chance that k of `count` answers, of which `right` pass, have one that does.

    Unbiased (Chen et al. 2021, arXiv 2107.03374 §2.1). Raises `CalmError` where k is above `count`.
    """
    if k > count:
        raise CalmError(f"pass@{k} needs {k} answers to each problem, not {count}")
    if count - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(count - right + 1, count + 1))


def _pass_at(k: int) -> Metric:
    def each(record: Record) -> float:
        return pass_at_k(len(record["passed"]), sum(record["passed"]), k)

    def score(records: Sequence[Record]) -> Score:
        of_one = k == 1 and all(len(record["passed"]) == 1 for record in records)
        return (_share(_passed) if of_one else _bootstrapped(_mean_of(each)))(records)

    return Metric(f"pass@{k}", score, _mean_of(each), _passed if k == 1 else None, "%")


# Of "logprob", a natural logarithm of a whole text's probability, and its "bytes".
_bits_per_byte = _ratio(
    lambda records: [(-r["logprob"] / math.log(2), r["bytes"]) for r in records]
)
_smoothed_bleu4 = _mean_of(lambda r: smoothed_bleu4(r["targets"], r["prediction"]))


def _sacrebleu(name: str, kind: str, **options: Any) -> Metric:
    """A corpus score of sacrebleu, with its own bootstrap."""

    def metric_of(**given: Any) -> Any:
        import sacrebleu.metrics

        class Floats(getattr(sacrebleu.metrics, kind)):
            def _compute_score_from_stats(self, stats: Any) -> Any:
                found = super()._compute_score_from_stats(stats)
                # Of resamples in which all is wrong it is a float, of others NumPy's, and
                # sacrebleu cannot take the mean of both.
                found.score = float(found.score)
                return found

        return Floats(**given, **options)

    def prepared(records: Sequence[Record]) -> tuple[Any, list[str]]:
        said = [record["prediction"].strip() for record in records]
        wanted = [record["targets"].strip() for record in records]
        return metric_of(references=[wanted]), said

    def score(records: Sequence[Record]) -> Score:
        metric, said = prepared(records)
        before = metric.get_signature()  # the bootstrap adds to it
        value = metric.corpus_score(said, None, n_bootstrap=RESAMPLES)
        told = json.loads(
            value.format(signature=str(metric.get_signature()), is_json=True, width=12)
        )
        # Where all is wrong, it tells none.
        middle, half = told.get("confidence_mean", 0.0), told.get("confidence_var", 0.0)
        return Score(float(value.score), (middle - half, middle + half), f"{value.name} {before}")

    # sacrebleu's own tests of significance call these two methods from outside as well.
    def of_records(records: Sequence[Record]) -> np.ndarray:
        metric, said = prepared(records)
        return np.array(metric._extract_corpus_statistics(said, None), np.float64)

    def value(sums_RK: np.ndarray) -> np.ndarray:
        metric = metric_of()
        return np.array([metric._compute_score_from_stats(sums.tolist()).score for sums in sums_RK])

    return Metric(name, score, Sums(of_records, value))


_judged = {
    "exact_match": _is_exact,
    "contains": _contains,
    "number": _is_number,
    "regex": _matches,
    "accuracy": _is_chosen,
    "accuracy_normalized": _is_chosen_normalized,
}
METRICS = {
    name: Metric(name, _share(judge), _mean_of(judge), judge, "%")
    for name, judge in _judged.items()
} | {
    metric.name: metric
    for metric in (
        # sacrebleu's signature does not hold beta: its name for the score does.
        _sacrebleu("chrf1", "CHRF", beta=1),
        _sacrebleu("chrf2", "CHRF", beta=2),
        # Scores of unlike systems are told, so a warning about tokenized answers would be noise.
        _sacrebleu("bleu", "BLEU", force=True),
        Metric("smoothed_bleu4", _bootstrapped(_smoothed_bleu4), _smoothed_bleu4),
        Metric("bits_per_byte", _bootstrapped(_bits_per_byte), _bits_per_byte, descends=True),
    )
}
# Metrics for a user's own prompts and answers.
OF_ANSWERS = ("exact_match", "contains", "number", "regex", "chrf1", "chrf2", "bleu")
