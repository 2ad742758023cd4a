"""Descriptions of functions in six programming languages: CodeXGLUE's code-to-text."""

import itertools
from typing import Any

from calm_jax.evaluation.tasks import folders
from calm_jax.evaluation.tasks.prompts import TEMPLATES
from calm_jax.evaluation.tasks.task import Example, Place, Task

_NAME = "CodeXGLUE code-to-text"
# In the order of the paper's Table 4.
_LANGUAGES = ("python", "php", "go", "java", "javascript", "ruby")
_SHOTS, _TOKENS = 3, 128
# Functions of thousands of tokens would leave no room for the question: too long for a shot.
_LONGEST_SHOT = 1000
_DRAWN_FROM = 5000


def codexglue(place: Place) -> list[Task]:
    """`LANGUAGE/train.jsonl` and `LANGUAGE/test.jsonl`, as its `preprocess.py` writes them."""
    where = folders.folder(place, _NAME)
    if (where / "dataset").is_dir():
        where = where / "dataset"
    found = [name for name in _LANGUAGES if (where / name).is_dir()]
    if not found:
        folders.needed(where, "python/test.jsonl", _NAME)
    tasks = []
    for name in place.chosen(found):
        splits = {}
        for split in ("train", "test"):
            path = folders.needed(where / name, f"{split}.jsonl", f"{_NAME}, {name}")
            fields = {"code_tokens": list, "docstring_tokens": list}
            records = folders.records(path, _NAME, fields)
            # Train splits are large, and only shots are drawn from them.
            records = itertools.islice(records, _DRAWN_FROM if split == "train" else None)
            splits[split] = list(map(_example, records))
        pool = [example for example in splits["train"] if len(example["code"]) <= _LONGEST_SHOT]
        tasks.append(
            Task(
                f"codexglue/{name}",
                splits["test"],
                TEMPLATES["code_to_text"],
                ("chrf1", "smoothed_bleu4"),
                group="codexglue",
                pool=pool,
                shots=_SHOTS,
                max_new_tokens=_TOKENS,
            )
        )
    return tasks


def _example(record: dict[str, Any]) -> Example:
    """Code and description as the task's own baseline reads them.

    The tokens have no docstring in them; the field "code" has one in some languages.
    """
    return {
        "code": " ".join(" ".join(record["code_tokens"]).split()),
        "targets": " ".join(" ".join(record["docstring_tokens"]).split()),
    }
