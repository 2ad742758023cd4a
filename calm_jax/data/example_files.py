"""A user's own files, JSON lines or Parquet, read as records, examples and token ids."""

import glob
import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from calm_jax.data import chat
from calm_jax.data.records import FIELDS, OPTIONAL, examples
from calm_jax.data.rows import CHUNK, Sequences
from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError
from calm_jax.text_files import parse_json, read_lines

# Keys of an entry that name files, and the endings of such files.
KINDS = {"jsonl": (".jsonl", ".jsonl.gz"), "parquet": (".parquet",)}


def kind_of(name: str) -> str | None:
    """The key of `KINDS` for a file of this name; None for any other name."""
    return next((kind for kind, ends in KINDS.items() if name.endswith(ends)), None)


class ExampleFiles:
    """The files of an entry of `config.data`.

    The entry is `{"jsonl": path}` or `{"parquet": path}`; the path may have wildcards (`*`, `?`,
    `[…]`). Matching files are read in the order of their names, and those that end in ".gz" are
    unpacked. `"columns": {field: column}` names the columns that hold the fields of `records`;
    then no other columns are read.

    Raises:
        CalmError: no file matches, or `columns` is not such a map.
    """

    def __init__(self, entry: Mapping[str, Any]):
        (self._kind,) = set(entry) & set(KINDS)
        self.pattern = str(entry[self._kind])
        self._columns = dict(entry.get("columns", {}))
        for field, column in self._columns.items():
            if field not in FIELDS or not isinstance(column, str):
                raise CalmError(
                    f"{self.pattern}: columns {{{field!r}: {column!r}}} is not the name of a "
                    f"column for one of {', '.join(FIELDS)}"
                )
        self._paths = _matching(self.pattern)
        end = next(end for end in (*KINDS[self._kind][::-1], "") if self.pattern.endswith(end))
        stem = pathlib.PurePath(self.pattern.removesuffix(end)).name
        self.name = f"{self._kind}/" + re.sub(r"[^\w.]", "_", stem)

    def identity(self) -> list[Any]:
        """All that determines the examples, as JSON values."""
        hashes = [file_hash(path) for path in self._paths]
        return [self._kind, hashes, [list(pair) for pair in sorted(self._columns.items())]]

    def examples(self, vocabulary: Vocabulary | None = None) -> Iterator[dict[str, Any]]:
        """The examples of every record, as `records.examples` describes them.

        Raises `CalmError` "FILE:LINE: …" for a bad record, in Parquet "FILE, row N: …".
        """
        read = _json_lines if self._kind == "jsonl" else _parquet_rows
        for path in self._paths:
            for place, record in read(path, list(self._columns.values())):
                try:
                    yield from examples(self._choose(record), vocabulary)
                except CalmError as error:
                    raise CalmError(f"{place}: {error}") from error

    def _choose(self, record: Any) -> Any:
        if not self._columns or not isinstance(record, Mapping):
            return record
        for field, column in self._columns.items():
            if column not in record and field not in OPTIONAL:
                raise CalmError(f'lacks "{column}", which "columns" names')
        return {field: record.get(column) for field, column in self._columns.items()}

    def sequences(self, vocabulary: Vocabulary, limit: int) -> Iterator[Sequences]:
        """The ids of the examples, with the end token after each answer; `limit` 0 is all.

        Raises `CalmError` as `examples` does, or for a vocabulary without an end token.
        """
        if vocabulary.eos_id is None:
            raise CalmError(f"{self.pattern}: {vocabulary} has no end token for its targets")
        found = itertools.islice(self.examples(vocabulary), limit or None)
        while chunk := list(itertools.islice(found, CHUNK)):
            prompts, answers = (
                [example[name] for example in chunk] for name in ("inputs", "targets")
            )
            is_turn = [example.get("is_turn", False) for example in chunk]
            ids = chat.encode_examples(vocabulary, prompts, answers, is_turn)
            yield Sequences.of(*ids, vocabulary.start_ids)


def _matching(pattern: str) -> list[str]:
    """The files that match a path with wildcards."""
    if not glob.has_magic(pattern) or epath.Path(pattern).exists():
        return [pattern]
    if "**" in pattern:
        raise CalmError(f"{pattern}: ** is not supported; * stands for names in one folder")
    parts = pattern.split("/")
    fixed = len(list(itertools.takewhile(lambda part: not glob.has_magic(part), parts)))
    root = "/".join(parts[:fixed]) or ("/" if fixed else ".")
    found = sorted(map(os.fspath, epath.Path(root).glob("/".join(parts[fixed:]))))
    if not found:
        raise CalmError(f"{pattern}: no file matches{_seen_from(pattern)}")
    return found


def file_hash(path: str) -> str:
    """SHA-256 of a file. Raises `CalmError` if it cannot be read."""
    try:
        with epath.Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CalmError(f"{path}: {error.strerror or error}{_seen_from(path)}") from error


def _seen_from(path: str) -> str:
    return "" if os.path.isabs(path) else f", seen from {os.getcwd()}"


def _json_lines(path: str, columns: list[str]) -> Iterator[tuple[str, Any]]:
    del columns  # a line is read whole
    blank = 0
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            blank = blank or number
            continue
        if blank:  # blank lines are allowed at the end of a file only
            raise CalmError(f"{path}:{blank}: the line is empty")
        yield f"{path}:{number}", parse_json(line, path, number)


def _parquet_rows(path: str, columns: list[str]) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with epath.Path(path).open("rb") as opened, parquet.ParquetFile(opened) as file:
            known = file.schema_arrow.names
            chosen = [name for name in known if name in (columns or FIELDS)] or known
            number = 0
            for batch in file.iter_batches(CHUNK, columns=chosen):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (OSError, pyarrow.ArrowException) as error:
        told = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise CalmError(f"{path}: {told}") from error
