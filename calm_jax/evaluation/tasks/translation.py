"""Translation into English: NTREX-128 and FLORES-200, a row for each language."""

import itertools

from etils import epath

from calm_jax.evaluation.tasks import folders
from calm_jax.evaluation.tasks.prompts import TEMPLATES
from calm_jax.evaluation.tasks.task import Example, Place, Task
from calm_jax.text_files import read_lines

_NTREX, _FLORES = "NTREX-128", "FLORES-200"
_SHOTS, _TOKENS = 5, 256
_METRICS = ("chrf1", "chrf2", "bleu")
# The languages of the CALM paper's Table 2, in its order.
_ORDER = ("lij", "mar", "taq", "nno", "sun", "ban", "pol", "tha", "min", "acm")
# NTREX has one split, a test set: at least this many lines, its last documents, are for shots.
_KEPT = 50


def ntrex(place: Place) -> list[Task]:
    """`newstest2019-src.eng.txt` and a `newstest2019-ref.XXX.txt` for each language.

    The shots are drawn from its last documents, which are never scored; where a document ends,
    `DOCUMENT_IDS.tsv` says.
    """
    where = folders.folder(place, _NTREX)
    if (where / "NTREX-128").is_dir():  # the repository around it
        where = where / "NTREX-128"
    english = folders.needed(where, "newstest2019-src.eng.txt", _NTREX)
    found = folders.languages(where, "newstest2019-ref.", ".txt")
    found = {name: path for name, path in found.items() if not name.startswith("eng")}
    names = place.chosen(_ordered(list(found)))
    targets = list(read_lines(english))
    end, tasks = _first_kept(where, len(targets)), []
    for name in names:
        sources = list(read_lines(found[name]))
        folders.check_parallel({english: len(targets), found[name]: len(sources)})
        pairs = _pairs(sources, targets)
        tasks.append(_task("ntrex", name, pairs[:end], pairs[end:]))
    return tasks


def flores(place: Place) -> list[Task]:
    """`devtest/XXX_Xxxx.devtest` for each language; the shots are drawn from `dev/`."""
    where = folders.folder(place, _FLORES)
    splits = {}
    for split in ("dev", "devtest"):
        inner = where / split
        found = folders.languages(inner, "", f".{split}") if inner.is_dir() else {}
        if "eng_Latn" not in found:
            folders.needed(where, f"{split}/eng_Latn.{split}", _FLORES)
        splits[split] = found
    both = [name for name in splits["devtest"] if name in splits["dev"] and name != "eng_Latn"]
    targets = {split: list(read_lines(found["eng_Latn"])) for split, found in splits.items()}
    tasks = []
    for name in place.chosen(_ordered(both)):
        pairs = {}
        for split, found in splits.items():
            english, other = targets[split], list(read_lines(found[name]))
            folders.check_parallel({found["eng_Latn"]: len(english), found[name]: len(other)})
            pairs[split] = _pairs(other, english)
        tasks.append(_task("flores", name, pairs["devtest"], pairs["dev"]))
    return tasks


def _ordered(names: list[str]) -> list[str]:
    """In the paper's order by the language's code, whatever its script."""
    by_code = sorted(names)
    codes = folders.in_order(list(dict.fromkeys(map(_code, by_code))), _ORDER)
    return [name for code in codes for name in by_code if _code(name) == code]


def _code(name: str) -> str:
    return name.replace("-", "_").partition("_")[0]


def _pairs(sources: list[str], targets: list[str]) -> list[Example]:
    return [
        {"source": source, "targets": target}
        for source, target in zip(sources, targets, strict=True)
    ]


def _first_kept(where: epath.Path, lines: int) -> int:
    """The first line that is never scored, of the document that the last lines begin in."""
    documents = folders.file(where, "DOCUMENT_IDS.tsv")
    start = max(lines - _KEPT, 1)
    if documents is None:
        return start
    names = list(itertools.islice(read_lines(documents), lines))
    while 1 < start < len(names) and names[start - 1] == names[start]:
        start -= 1
    return start


def _task(group: str, language: str, examples: list[Example], pool: list[Example]) -> Task:
    return Task(
        f"{group}/{language}",
        examples,
        TEMPLATES["translation"],
        _METRICS,
        group=group,
        pool=pool,
        shots=_SHOTS,
        max_new_tokens=_TOKENS,
    )
