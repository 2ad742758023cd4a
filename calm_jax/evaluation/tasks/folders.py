"""Files of published data sets, read as their authors distribute them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from calm_jax.checkpoints.files import absolute
from calm_jax.errors import CalmError
from calm_jax.evaluation.tasks.task import Place
from calm_jax.text_files import parse_json, read_lines

_NAMED = 6  # files of a folder that a message names


def folder(place: Place, what: str) -> epath.Path:
    """The folder that a place names. Raises `CalmError` if it names none, or none that exists."""
    if not place.path:
        raise CalmError(f"{place.family} needs the folder of {what}: {place.family}:FOLDER")
    path = absolute(place.path)
    if not path.is_dir():
        is_instead = "is a file" if path.exists() else "does not exist"
        raise CalmError(f"{path} is not a folder of {what}: it {is_instead}")
    return path


def file(where: epath.Path, name: str) -> epath.Path | None:
    """The file of this name, with or without .gz at its end; None if there is neither."""
    for path in (where / name, where / f"{name}.gz"):
        if path.exists():
            return path
    return None


def needed(where: epath.Path, name: str, what: str) -> epath.Path:
    """`file`, or a `CalmError` that says what the folder has instead."""
    found = file(where, name)
    if found is None:
        raise CalmError(f"{where} is not a folder of {what}: it has no {name}; {_has(where)}")
    return found


def records(
    path: epath.Path, what: str, fields: Mapping[str, type | tuple[type, ...]]
) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises `CalmError` for one without these fields."""
    for number, line in enumerate(read_lines(path), 1):
        value = parse_json(line, path, number)
        for field, kind in fields.items():
            if not isinstance(value, dict) or not isinstance(value.get(field), kind):
                has = ", ".join(value) if isinstance(value, dict) else type(value).__name__
                raise CalmError(f"{path}:{number} is none of {what}: no {field!r} in it; has {has}")
        yield value


def check_parallel(counts: Mapping[epath.Path, int]) -> None:
    """Raises `CalmError` unless all files have as many lines as the first."""
    first, *others = counts
    for other in others:
        if counts[other] != counts[first]:
            raise CalmError(
                f"{other} has {counts[other]} lines, but {first} has {counts[first]}: they are "
                "not translations line by line"
            )


def languages(where: epath.Path, start: str, end: str) -> dict[str, epath.Path]:
    """The files START…END in a folder, gzipped or not, by the text between START and END."""
    found = {}
    for path in sorted(where.iterdir()):
        name = path.name.removesuffix(".gz")
        if name.startswith(start) and name.endswith(end):
            found[name.removeprefix(start).removesuffix(end)] = path
    return found


def in_order(found: Sequence[str], order: Sequence[str]) -> list[str]:
    """The names in the given order, then the others by name."""
    rank = {name: number for number, name in enumerate(order)}
    return sorted(found, key=lambda name: (rank.get(name, len(rank)), name))


def _has(where: epath.Path) -> str:
    names = sorted(path.name for path in where.iterdir())
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"it has {', '.join(names[:_NAMED]) or 'nothing'}{more}"
