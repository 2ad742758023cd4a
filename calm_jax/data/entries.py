"""Data by name: entries of `config.data`, opened as rows to train on or texts to score on."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from calm_jax import processes
from calm_jax.data import built_in, cache
from calm_jax.data.alignment import VERSION
from calm_jax.data.dataset import Dataset, TaskRows
from calm_jax.data.example_files import KINDS, ExampleFiles, file_hash, kind_of
from calm_jax.data.own_tokens import OwnTokens, alignments
from calm_jax.data.rows import Sequences
from calm_jax.data.vocabulary import Vocabulary, check_ids
from calm_jax.errors import CalmError

ENTRY_KEYS = {"task", *KINDS, "columns", "import", "weight", "loss_on_inputs"}


def open_splits(
    data: Mapping[str, Any], vocabulary: Vocabulary, augments: Sequence[Vocabulary | None] = ()
) -> dict[str, Dataset]:
    """The rows of "train" and, if the config has any, of "validation"; one process builds them.

    All processes must call this. Raises `CalmError` as `open_dataset`.
    """
    splits = ("train", "validation") if data["validation"] else ("train",)
    return processes.in_turns(
        lambda: {split: open_dataset(data, split, vocabulary, augments) for split in splits}
    )


def own_length(data: Mapping[str, Any]) -> int:
    """The tokens in a row of an augment that reads its own."""
    return data["augment_length"] or data["length"]


def open_dataset(
    data: Mapping[str, Any],
    split: str,
    vocabulary: Vocabulary,
    augments: Sequence[Vocabulary | None] = (),
) -> Dataset:
    """The rows of `data[split]` ("train" or "validation"); builds what is not cached yet.

    `data` is `config.data`: entries `{"task": name, "import": module}` or those of `ExampleFiles`,
    each with `weight` and `loss_on_inputs`; and `length`, `pack`, `strict`, `limit`, `cache_dir`.
    Texts are tokenised with `vocabulary`. Those of `augments`, by number, that differ from it add
    rows of `augment_length` tokens of their own. TensorFlow is imported only if a task is not
    cached yet. Raises `CalmError` for a bad entry or record, and with `strict` if an answer would
    be cut.
    """
    parts, digests = [], []
    own = [
        OwnTokens(number, alignment, own_length(data))
        for number, alignment in alignments(vocabulary, augments).items()
    ]
    for entry in data[split]:
        check_entry(entry, split)
    for entry in map(dict, data[split]):
        folder, index = _cached(entry, data, split, vocabulary, own)
        for message in _cuts(index["parts"], data, entry):
            logging.warning("%s", message)
        for number, part in enumerate(index["parts"]):
            weight = entry.get("weight", 1.0) * part["rate"]
            digests.append(part["digest"])
            arrays = cache.read_part(folder / str(number))
            # The rows may have been cached from a file of another name.
            name = ExampleFiles(entry).name if files_of(entry) else part["name"]
            parts.append(TaskRows(name, weight, entry.get("loss_on_inputs", False), arrays))
    if not parts:
        raise CalmError(f"data.{split} names no task")
    fingerprint = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    return Dataset(tuple(parts), data["length"], f"{cache.FORMAT}-{fingerprint}")


def evaluation_examples(
    task: str | Mapping[str, Any],
    split: str,
    vocabulary: Vocabulary,
    limit: int = 0,
    cache_dir: str = "",
) -> list[dict[str, Any]]:
    """A task's examples: texts `inputs` and `targets`, and further fields; `limit` 0 is all.

    `task` is a registered name, a file or files ("….jsonl", "….parquet"), or an entry of
    `config.data` as for `open_dataset`. Key-value examples also have `set` (subs, num, math),
    `operands` and `unseen`, those of a file the fields of `records.examples`. Imports TensorFlow
    for a registered name. Raises `CalmError` as `open_dataset` does.
    """
    entry = named_entry(task) if isinstance(task, str) else dict(task)
    check_entry(entry, "evaluation")
    if "task" not in entry:
        examples = ExampleFiles(entry).examples(vocabulary)
    else:
        from calm_jax.data import tasks

        found = _tasks(entry, split, vocabulary, cache.cache_directory(cache_dir))
        examples = (e for task, _ in found for e in tasks.text_examples(task, split, limit))
    return list(itertools.islice(examples, limit or None))


def check_entry(entry: Mapping[str, Any], split: str) -> None:
    """Raises `CalmError` for a malformed entry of `data[split]`, naming the key."""
    if not isinstance(entry, Mapping | ConfigDict):
        raise CalmError(
            f"data.{split}: {entry!r} is not an entry; write ({{'jsonl': 'file.jsonl'}},) or "
            "({'task': 'name'},)"
        )
    if unknown := sorted(set(entry) - ENTRY_KEYS):
        raise CalmError(f"data.{split}: unknown key {unknown[0]!r}; known are {sorted(ENTRY_KEYS)}")
    named = [key for key in ("task", *KINDS) if key in entry]
    if len(named) != 1:
        raise CalmError(f"data.{split}: {entry} needs either 'task', 'jsonl' or 'parquet'")
    if not isinstance(entry.get("weight", 1.0), int | float) or entry.get("weight", 1.0) <= 0:
        raise CalmError(
            f"data.{split}: weight {entry['weight']!r} of {entry[named[0]]} is not a number above 0"
        )
    for key, kinds in (("import", ("task",)), ("columns", tuple(KINDS))):
        if key in entry and named[0] not in kinds:
            raise CalmError(f"data.{split}: {key!r} does not apply to {named[0]!r}")


def _cuts(
    parts: Sequence[Mapping[str, Any]], data: Mapping[str, Any], entry: Mapping[str, Any]
) -> list[str]:
    """A warning for each part of an entry in which answers are cut at the end of a row.

    Raises `CalmError` instead with `data.strict`, or if no answer is left in a part.
    """

    def warning(part: Mapping[str, Any], counts: Mapping[str, Any], problem: str) -> str:
        message = (
            f"{files_of(entry) or part['name']}: {counts['cut']:,} of {part['examples']:,} "
            f"{problem}; the longest has {counts['longest']:,} tokens"
        )
        if data["strict"]:
            raise CalmError(f"{message} (data.strict)")
        return message

    found = []
    for part in parts:
        # Older caches have no entry for augments.
        for own in part.get("augments", ()):
            if own["cut"]:
                problem = f"examples are longer than data.augment_length {own_length(data)}"
                message = warning(part, own, f"{problem} in the own tokens of an augment")
                found.append(f"{message}; the augment reads their beginning")
        if not part["cut"]:
            continue
        problem = f"examples are longer than data.length {data['length']}"
        message = warning(part, part, problem)
        lost = 0 if entry.get("loss_on_inputs") else part["answers_lost"]
        if lost == part["examples"]:
            raise CalmError(f"{message}; none of its answers is left to train on")
        left = f", {lost:,} of them before the answer begins" if lost else ""
        found.append(f"{message}; they are cut{left}")
    return found


def named_entry(name: str) -> dict[str, Any]:
    """The entry that a name means: a file if its ending is one of `KINDS`, else a task."""
    return {kind_of(name) or "task": name}


def files_of(entry: Mapping[str, Any]) -> str | None:
    """The path of an entry that names files; None for a task."""
    return next((entry[kind] for kind in KINDS if kind in entry), None)


def identity(entry: Mapping[str, Any]) -> list[str]:
    """All that determines the texts of an entry, found without importing its module."""
    if "task" not in entry:
        return ExampleFiles(entry).identity()
    if fingerprint := built_in.task_fingerprint(entry["task"]):
        return [entry["task"], fingerprint]
    if module := entry.get("import"):
        try:
            spec = importlib.util.find_spec(module)
        except ImportError:
            spec = None
        if spec is None:
            raise CalmError(f"task {entry['task']!r}: there is no module {module!r} to import")
        return [entry["task"], module, file_hash(spec.origin)]
    return [entry["task"]]


def _cached(
    entry: Mapping[str, Any],
    data: Mapping[str, Any],
    split: str,
    vocabulary: Vocabulary,
    own: Sequence[OwnTokens],
) -> tuple[pathlib.Path, dict[str, Any]]:
    cache_dir = cache.cache_directory(data["cache_dir"])
    determines = [identity(entry), split, vocabulary.tokenization_fingerprint]
    determines += [data["length"], data["pack"], data["limit"]]
    # Rows that were checked for a larger embedding may not fit this one.
    if vocabulary.rows is not None and vocabulary.rows < vocabulary.size:
        determines.append(vocabulary.rows)
    for each in own:
        augment = each.alignment.augment
        determines.append([each.number, augment.tokenization_fingerprint, each.length, VERSION])
        determines.append(augment.rows)

    def build(folder: pathlib.Path) -> dict[str, Any]:
        parts = []
        opened = _open_parts(entry, split, vocabulary, cache_dir, data["limit"])
        for number, (name, rate, chunks) in enumerate(opened):
            chunks = _checked(chunks, name, vocabulary)
            named = [dataclasses.replace(each, where=name) for each in own]
            path = folder / str(number)
            with contextlib.closing(chunks):  # an error begins a line of its own
                counts = cache.write_part(path, chunks, data["length"], data["pack"], named)
            if not counts["rows"]:
                if files := files_of(entry):
                    raise CalmError(f"{files}: the file is empty")
                raise CalmError(f"{name}: the split {split!r} has no examples")
            parts.append({"name": name, "rate": rate, **counts})
        _cuts(parts, data, entry)  # may refuse, before anything is cached
        return {"entry": dict(entry), "split": split, "length": data["length"], "parts": parts}

    return cache.ready_folder(cache_dir, determines, build)


def _open_parts(
    entry: Mapping[str, Any],
    split: str,
    vocabulary: Vocabulary,
    cache_dir: pathlib.Path,
    limit: int,
) -> Iterator[tuple[str, float, Iterator[Sequences]]]:
    """The name, the share and the sequences of each part of an entry."""
    if "task" not in entry:
        files = ExampleFiles(entry)
        progress = tqdm(desc=f"{files.name} {split}", unit=" examples")
        yield files.name, 1.0, _with_progress(files.sequences(vocabulary, limit), progress)
        return
    from calm_jax.data import tasks

    for task, rate in _tasks(entry, split, vocabulary, cache_dir):
        total = min(filter(None, (task.num_input_examples(split), limit)), default=None)
        progress = tqdm(total=total, desc=f"{task.name} {split}", unit=" examples")
        sequences = tasks.sequences(task, split, vocabulary.start_ids, limit)
        yield task.name, rate, _with_progress(sequences, progress)


def _with_progress(chunks: Iterator[Sequences], progress: tqdm) -> Iterator[Sequences]:
    with progress:
        for chunk in chunks:
            yield chunk
            progress.update(len(chunk))


def _checked(chunks: Iterator[Sequences], name: str, vocabulary: Vocabulary) -> Iterator[Sequences]:
    for chunk in chunks:
        if vocabulary.rows is not None:
            ids = np.concatenate([chunk.before_N, chunk.ids_M])
            check_ids(ids, vocabulary.rows, f"{name}:", vocabulary)
        yield chunk


def _tasks(
    entry: Mapping[str, Any], split: str, vocabulary: Vocabulary, cache_dir: pathlib.Path
) -> list[tuple[Any, float]]:
    """The seqio Tasks of an entry, with their shares, ready to be read in `vocabulary`.

    Imports TensorFlow. Raises `CalmError` for an unknown task or split.
    """
    from calm_jax.data import tasks

    built_in.register_tasks()
    found = []
    for task, rate in tasks.find(entry["task"], entry.get("import", "")):
        if isinstance(task, tasks.Task):
            task.prepare(cache_dir / "tfds")
        if split not in task.splits:
            known = ", ".join(sorted(task.splits))
            raise CalmError(f"task {task.name!r} has no split {split!r}; it has {known}")
        found.append((tasks.with_vocabulary(task, vocabulary), rate))
    return found
