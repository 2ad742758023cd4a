"""Word problems with a number as the answer: GSM8K, and MGSM, the same in other languages.

A folder of MGSM may also hold other translations of the same form, `mgsm_XX.tsv`.
"""

import ast
import re
from typing import Any

from etils import epath

from calm_jax.errors import CalmError
from calm_jax.evaluation.tasks import folders
from calm_jax.evaluation.tasks.prompts import TEMPLATES
from calm_jax.evaluation.tasks.task import Example, Place, Task

_GSM8K, _MGSM = "GSM8K", "MGSM"
_TOKENS, _SHOTS = 400, 8
# As the tables of the CALM paper have them: from few to many resources, App. A.2 and Table 3.
_ORDER = (
    "meo mfa pcm efi min ilo ady mai nso mzn bew ts dv bho cv mni or kri tk gom ug ckb as doi dz "
    "en te bn sw ja zh th fr es de"
)
_LABEL = re.compile(r"([^:：]{1,40}[:：])\s*")


def gsm8k(place: Place) -> list[Task]:
    """`train.jsonl` and `test.jsonl` of the authors' folder; or TFDS's, where it is prepared."""
    if place.path:
        where = folders.folder(place, _GSM8K)
        splits = {split: _problems(where, split) for split in ("train", "test")}
    else:
        splits = _of_tfds()
    return [
        Task(
            "gsm8k",
            splits["test"],
            TEMPLATES["gsm8k"],
            ("number",),
            pool=splits["train"],
            shots=_SHOTS,
            max_new_tokens=_TOKENS,
        )
    ]


def mgsm(place: Place) -> list[Task]:
    """`mgsm_XX.tsv` for each language, with the shots of `exemplars.py` beside them.

    Without those the shots are English ones, of GSM8K's train split in `../gsm8k`.
    """
    where = folders.folder(place, _MGSM)
    found = folders.languages(where, "mgsm_", ".tsv")
    if not found:
        folders.needed(where, "mgsm_en.tsv", _MGSM)
    own = _exemplars(where)
    names = place.chosen(folders.in_order(list(found), _ORDER.split()))
    english = [] if all(name in own for name in names) else _english(where)
    return [_translated(name, found[name], own.get(name), english) for name in names]


def _problems(where: epath.Path, split: str) -> list[Example]:
    path = folders.needed(where, f"{split}.jsonl", _GSM8K)
    fields = {"question": str, "answer": str}
    return [_problem(record) for record in folders.records(path, _GSM8K, fields)]


def _problem(record: dict[str, Any]) -> Example:
    answer = re.sub(r"<<.*?>>", "", record["answer"])  # what a calculator is to be told
    target = answer.rpartition("####")[2].strip()
    return {"question": record["question"], "answer": answer, "targets": target}


def _of_tfds() -> dict[str, list[Example]]:
    """What TFDS has on this disk; it is not asked to download anything."""
    from calm_jax.quiet import import_tensorflow

    import_tensorflow()
    import tensorflow_datasets as tfds

    builder = tfds.builder("gsm8k")
    if not builder.is_prepared():
        raise CalmError(
            f"gsm8k: TFDS has not prepared it in {builder.data_dir}; name a folder, gsm8k:FOLDER, "
            "or let TFDS download it: tfds build gsm8k"
        )
    return {
        split: [
            _problem({key: record[key].decode() for key in ("question", "answer")})
            for record in builder.as_dataset(split=split).as_numpy_iterator()
        ]
        for split in ("train", "test")
    }


def _translated(
    language: str, path: epath.Path, own: dict[str, Any] | None, english: list[Example]
) -> Task:
    labels = {"question_label": "Question: ", "answer_label": "Answer:"}
    pool = [{**shot, "answer": f" {shot['answer']}"} for shot in english]
    if own is not None:
        labels, pool = own["labels"], own["shots"]
    examples = []
    for number, line in enumerate(folders.read_lines(path), 1):
        question, tab, target = line.rpartition("\t")
        if not tab or not re.search(r"\d", target):
            raise CalmError(f"{path}:{number} is none of {_MGSM}: not a question, a tab, a number")
        examples.append({"question": question, "targets": target.strip(), **labels})
    return Task(
        f"mgsm/{language}",
        examples,
        TEMPLATES["mgsm"],
        ("number",),
        group="mgsm",
        pool=[{**shot, **labels} for shot in pool],
        shots=_SHOTS,
        max_new_tokens=_TOKENS,
    )


def _english(where: epath.Path) -> list[Example]:
    """Examples of GSM8K's train split beside the folder, if it is there."""
    beside = where.parent / "gsm8k"
    return _problems(beside, "train") if folders.file(beside, "train.jsonl") else []


def _exemplars(where: epath.Path) -> dict[str, dict[str, Any]]:
    """The shots and labels of each language in `exemplars.py`, which is read and never run."""
    path = where / "exemplars.py"
    if not path.exists():
        return {}
    found = None
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MGSM_EXEMPLARS":
            found = ast.literal_eval(node.value)
    if not isinstance(found, dict):
        raise CalmError(f"{path} has no table MGSM_EXEMPLARS")
    return {language: _labelled(path, language, shots) for language, shots in found.items()}


def _labelled(path: epath.Path, language: str, shots: dict[str, Any]) -> dict[str, Any]:
    """The shots without the labels that stand before their questions and answers."""
    parted = [(_LABEL.match(shot["q"]), _LABEL.match(shot["a"]), shot) for shot in shots.values()]
    if not parted or not all(q and a for q, a, _ in parted):
        raise CalmError(f"{path}: a question or an answer of {language} has no label before it")
    examples = [
        {"question": shot["q"][q.end() :], "answer": shot["a"][a.end(1) :], "targets": ""}
        for q, a, shot in parted
    ]
    labels = {"question_label": parted[0][0][0], "answer_label": parted[0][1][1]}
    return {"labels": labels, "shots": examples}
