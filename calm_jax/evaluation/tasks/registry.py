"""All families of tasks, and how `--tasks` names them."""

from collections.abc import Callable

from calm_jax.data.example_files import kind_of
from calm_jax.errors import CalmError
from calm_jax.evaluation.tasks import arithmetic, code_to_text, own_files, programs, translation
from calm_jax.evaluation.tasks.task import Place, Task

FAMILIES: dict[str, Callable[[Place], list[Task]]] = {
    "gsm8k": arithmetic.gsm8k,
    "mgsm": arithmetic.mgsm,
    "ntrex": translation.ntrex,
    "flores": translation.flores,
    "humaneval": programs.humaneval,
    "mbpp": programs.mbpp,
    "codexglue": code_to_text.codexglue,
    "choices": own_files.choices,
    "text": own_files.text,
}
_OF_LANGUAGES = {"mgsm", "ntrex", "flores", "codexglue"}


def place_of(name: str) -> Place | None:
    """What `FAMILY[/LANGUAGE+LANGUAGE…][:PATH]` names; None of a Task's or a file's own name.

    Raises `CalmError` for languages of a family that has none.
    """
    head, _, path = name.partition(":")
    family, slash, languages = head.partition("/")
    if family not in FAMILIES or (not path and kind_of(name)):
        return None
    if slash and family not in _OF_LANGUAGES:
        raise CalmError(f"--tasks={name}: {family} has no languages; write {family}:PATH")
    return Place(family, tuple(filter(None, languages.split("+"))), path)


def open_tasks(name: str) -> list[Task] | None:
    """The rows of a name in `--tasks`, their files read; None of what is no family's.

    Raises `CalmError` as the family does for its folder.
    """
    place = place_of(name)
    if place is None:
        return None
    tasks = FAMILIES[place.family](place)
    for task in tasks:
        if not task.examples:
            raise CalmError(f"{place.path or name}: {task.name} has no example")
    return tasks
