"""Python programs that tests find right or wrong: HumanEval and MBPP, run in the sandbox."""

import concurrent.futures
import os
from collections.abc import Callable
from typing import Any

from etils import epath
from tqdm import tqdm

from calm_jax.errors import CalmError
from calm_jax.evaluation import sandbox
from calm_jax.evaluation.tasks import folders
from calm_jax.evaluation.tasks.prompts import TEMPLATES
from calm_jax.evaluation.tasks.task import Example, Place, Task

_TOKENS = 512
_HUMAN_EVAL, _MBPP = "HumanEval", "MBPP"
# Of its authors: prompts of few shots, and the test split; the others are left to training.
_MBPP_SHOTS, _MBPP_TEST = range(1, 11), range(11, 511)


def humaneval(place: Place) -> list[Task]:
    """`HumanEval.jsonl` in a folder."""
    path = folders.needed(folders.folder(place, _HUMAN_EVAL), "HumanEval.jsonl", _HUMAN_EVAL)
    examples = human_eval_problems(path)
    return [_task("humaneval", examples, human_eval_program)]


def mbpp(place: Place) -> list[Task]:
    """`mbpp.jsonl` in a folder: task ids 11 to 510, with shots of 1 to 10."""
    path = folders.needed(folders.folder(place, _MBPP), "mbpp.jsonl", _MBPP)
    by_id = {example["task_id"]: example for example in mbpp_problems(path)}
    examples = [by_id[number] for number in _MBPP_TEST if number in by_id]
    pool = [by_id[number] for number in _MBPP_SHOTS if number in by_id]
    if not examples:
        raise CalmError(f"{path} has none of the task ids 11 to 510, which {_MBPP} is scored on")
    return [_task("mbpp", examples, mbpp_program, pool, 3)]


def human_eval_problems(path: epath.Path) -> list[Example]:
    """Each problem, with "targets", its canonical solution."""
    fields = {"task_id": str, "prompt": str, "entry_point": str, "canonical_solution": str,
              "test": str}  # fmt: skip
    return [
        {**record, "targets": record["canonical_solution"]}
        for record in folders.records(path, _HUMAN_EVAL, fields)
    ]


def mbpp_problems(path: epath.Path) -> list[Example]:
    """Each problem, with "targets", its own code."""
    fields = {"task_id": int, "text": str, "code": str, "test_list": list}
    found = []
    for record in folders.records(path, _MBPP, fields):
        code = record["code"].replace("\r\n", "\n")
        tests = "\n".join(record["test_list"])
        setup = record.get("test_setup_code") or ""
        found.append({"task_id": record["task_id"], "text": record["text"], "code": code,
                      "tests": tests, "setup": setup, "targets": code})  # fmt: skip
    return found


def human_eval_program(example: Example, answer: str) -> tuple[str, str]:
    """The program of an answer, and the tests that it must pass, as human-eval puts them."""
    tests = f"{example['test']}\ncheck({example['entry_point']})"
    return example["prompt"] + answer, tests


def mbpp_program(example: Example, answer: str) -> tuple[str, str]:
    """The program of an answer, and the asserts that it must pass."""
    return answer, f"{example['setup']}\n{example['tests']}"


def judged(
    records: list[Example], program: Callable[[Example, str], tuple[str, str]], name: str
) -> None:
    """Runs every answer, and puts "passed" and "outcomes" into the records, one for each answer."""
    asked = [
        (number, *program(record, answer))
        for number, record in enumerate(records)
        for answer in record.get("samples", [record["prediction"]])
    ]
    for record in records:
        record["passed"], record["outcomes"] = [], []
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads,
        tqdm(total=len(asked), desc=f"{name}: tests", unit="program") as progress,
    ):
        outcomes = threads.map(lambda one: sandbox.run(one[1], one[2]), asked)
        for (number, *_), outcome in zip(asked, outcomes, strict=True):
            records[number]["passed"].append(outcome.passed)
            records[number]["outcomes"].append(outcome.told)
            progress.update()


def _task(
    name: str,
    examples: list[Example],
    program: Callable[[Example, str], tuple[str, str]],
    pool: Any = (),
    shots: int = 0,
) -> Task:
    return Task(
        name,
        examples,
        TEMPLATES[name],
        ("pass@1",),
        pool=pool,
        shots=shots,
        max_new_tokens=_TOKENS,
        judge=lambda records: judged(records, program, name),
        needs=lambda: sandbox.check(name),
    )
