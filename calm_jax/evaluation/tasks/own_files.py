"""A user's own files: choices by probability, and texts by bits per byte."""

from etils import epath

from calm_jax.checkpoints.files import absolute, read_bytes
from calm_jax.errors import CalmError
from calm_jax.evaluation.tasks import folders
from calm_jax.evaluation.tasks.prompts import TEMPLATES
from calm_jax.evaluation.tasks.task import Example, Place, Task
from calm_jax.text_files import read_lines


def choices(place: Place) -> list[Task]:
    """A file of JSON lines `{"inputs": …, "choices": ["…", …], "answer": NUMBER or "CHOICE"}`."""
    path = _file(place, "a file of JSON lines")
    fields = {"inputs": str, "choices": list, "answer": (int, str)}
    examples = [
        _choice(record, f"{path}:{number}")
        for number, record in enumerate(folders.records(path, "choices", fields), 1)
    ]
    name, metrics = f"choices/{_stem(path)}", ("accuracy", "accuracy_normalized")
    return [Task(name, examples, TEMPLATES["choices"], metrics, answered="choices")]


def text(place: Place) -> list[Task]:
    """A text, or a file of JSON lines `{"text": …}`, each a text of its own."""
    path = _file(place, "a text")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        texts = [one["text"] for one in folders.records(path, "texts", {"text": str})]
    elif path.name.endswith(".gz"):
        texts = ["\n".join(read_lines(path))]
    else:
        try:
            texts = [read_bytes(path).decode()]
        except UnicodeDecodeError as error:
            raise CalmError(f"{path}: not UTF-8 text at byte {error.start:,}") from None
    examples = [{"text": one} for one in texts if one]
    name = f"text/{_stem(path)}"
    return [Task(name, examples, TEMPLATES["text"], ("bits_per_byte",), answered="reading")]


def _file(place: Place, what: str) -> epath.Path:
    if not place.path:
        raise CalmError(f"{place.family} needs {what}: {place.family}:FILE")
    return absolute(place.path)


def _stem(path: epath.Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[0] or "text"


def _choice(record: dict, where: str) -> Example:
    options, answer = record["choices"], record["answer"]
    if len(options) < 2 or not all(isinstance(option, str) and option for option in options):
        raise CalmError(f'{where}: "choices" {options!r} are not two texts or more')
    if isinstance(answer, str):
        if answer not in options:
            raise CalmError(f'{where}: the "answer" {answer!r} is none of the choices {options!r}')
        answer = options.index(answer)
    if isinstance(answer, bool) or not 0 <= answer < len(options):
        raise CalmError(f'{where}: the "answer" {answer} is none of the {len(options)} choices')
    return {**record, "answer": answer, "targets": options[answer]}
