"""Tokenised, packed examples on disk: written once, then read by index without TensorFlow.

A cache is a folder named by a fingerprint of all that decides its content:

    index.json            its parts (one a Task; a Mixture has several), with counts
    0/targets.npy         int32 [N, T] target ids
    0/segment_ids.npy     int32 [N, T] 1, 2, … for the sequences of a row, 0 for padding
    0/prompt.npy          uint8 [N, T] 1 where the target is of the prompt

It is written beside and renamed when complete.
"""

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from calm_jax.data import jsonl, key_value
from calm_jax.data.source import DTYPES, Part, Source
from calm_jax.data.vocabulary import Vocabulary, check_ids
from calm_jax.errors import CalmError

FORMAT = 2

# Sequences that are packed together, and rows that are open at a time while they are.
PACK_CHUNK = 8192
PACK_ROWS = 256

ENTRY_KEYS = {"task", "jsonl", "import", "weight", "loss_on_inputs"}


def cache_directory(setting: str = "") -> pathlib.Path:
    """Where data is kept: `setting`, else `$CALM_CACHE`, else `~/.cache/calm_jax`; a local disk."""
    return pathlib.Path(setting or os.environ.get("CALM_CACHE") or "~/.cache/calm_jax").expanduser()


def open_source(data: Mapping[str, Any], split: str, vocabulary: Vocabulary) -> Source:
    """The rows of `data[split]` ("train" or "validation"); builds what is not cached yet.

    `data` is `config.data`: entries `{"task": name, "import": module}` or `{"jsonl": path}`, each
    with `weight` and `loss_on_inputs`; `length`, `pack`, `strict`, `limit`, `cache_dir`. Texts are
    tokenised with `vocabulary`. With a ready cache TensorFlow is not imported.
    Raises `CalmError` for a bad entry or line, and with `strict` for a sequence too long.
    """
    cache_dir = cache_directory(data["cache_dir"])
    parts, folders = [], []
    for entry in data[split]:
        check_entry(entry, split)
    for entry in map(dict, data[split]):
        folder = _cached(entry, data, split, vocabulary, cache_dir)
        folders.append(folder.name)
        index = json.loads((folder / "index.json").read_text())
        for message in _cuts(index["parts"], data, entry):
            logging.warning("%s", message)
        for number, part in enumerate(index["parts"]):
            files = {name: folder / str(number) / f"{name}.npy" for name in DTYPES}
            arrays = {name: np.load(file, mmap_mode="r") for name, file in files.items()}
            weight = entry.get("weight", 1.0) * part["rate"]
            parts.append(Part(part["name"], weight, entry.get("loss_on_inputs", False), arrays))
    if not parts:
        raise CalmError(f"data.{split} names no task")
    fingerprint = hashlib.sha256(json.dumps(folders).encode()).hexdigest()
    return Source(tuple(parts), data["length"], vocabulary.start_id, fingerprint)


def check_entry(entry: Mapping[str, Any], split: str) -> None:
    if not isinstance(entry, Mapping | ConfigDict):
        raise CalmError(
            f"data.{split}: {entry!r} is not an entry; write ({{'jsonl': 'file.jsonl'}},) or "
            "({'task': 'name'},)"
        )
    if unknown := sorted(set(entry) - ENTRY_KEYS):
        raise CalmError(f"data.{split}: unknown key {unknown[0]!r}; known are {sorted(ENTRY_KEYS)}")
    if ("task" in entry) == ("jsonl" in entry):
        raise CalmError(f"data.{split}: {entry} needs either 'task' or 'jsonl'")
    if not isinstance(entry.get("weight", 1.0), int | float) or entry.get("weight", 1.0) <= 0:
        name = entry.get("task", entry.get("jsonl"))
        raise CalmError(
            f"data.{split}: weight {entry['weight']!r} of {name} is not a number above 0"
        )


def _cuts(
    parts: Sequence[Mapping[str, Any]], data: Mapping[str, Any], entry: Mapping[str, Any]
) -> list[str]:
    """What to say of sequences longer than a row. Raises `CalmError` where that is refused."""
    found = []
    for part in parts:
        if not part["cut"]:
            continue
        name = entry.get("jsonl", part["name"])
        message = (
            f"{name}: {part['cut']:,} of {part['examples']:,} sequences are longer than "
            f"data.length {data['length']}; the longest has {part['longest']:,} tokens"
        )
        if data["strict"]:
            raise CalmError(f"{message} (data.strict)")
        lost = 0 if entry.get("loss_on_inputs") else part["answers_lost"]
        if lost == part["examples"]:
            raise CalmError(f"{message}; of none is anything left to train on")
        left = f", and of {lost:,} nothing is left to train on" if lost else ""
        found.append(f"{message}; they are cut{left}")
    return found


def identity(entry: Mapping[str, Any]) -> list[str]:
    """What decides the texts of an entry, found without importing it."""
    if "jsonl" in entry:
        return ["jsonl", _file_hash(entry["jsonl"])]
    if config := key_value.parse_task(entry["task"]):
        return [entry["task"], config.fingerprint]
    if module := entry.get("import"):
        try:
            spec = importlib.util.find_spec(module)
        except ImportError:
            spec = None
        if spec is None:
            raise CalmError(f"task {entry['task']!r}: there is no module {module!r} to import")
        return [entry["task"], module, _file_hash(spec.origin)]
    return [entry["task"]]


def _file_hash(path: str) -> str:
    try:
        with epath.Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        here = "" if os.path.isabs(path) else f", seen from {os.getcwd()}"
        raise CalmError(f"{path}: {error.strerror or error}{here}") from error


def _cached(
    entry: Mapping[str, Any],
    data: Mapping[str, Any],
    split: str,
    vocabulary: Vocabulary,
    cache_dir: pathlib.Path,
) -> pathlib.Path:
    decides = [FORMAT, identity(entry), split, vocabulary.tokenization_fingerprint]
    decides += [data["length"], data["pack"], data["limit"]]
    if vocabulary.rows is not None and vocabulary.rows < vocabulary.size:
        decides.append(vocabulary.rows)  # what was made for more was not checked for these
    fingerprint = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:24]
    folder = cache_dir / "tokens" / fingerprint
    if (folder / "index.json").is_file():
        return folder
    beside = folder.with_name(f"{fingerprint}.incomplete.{uuid.uuid4().hex}")
    try:
        beside.mkdir(parents=True)
        _build(beside, entry, data, split, vocabulary, cache_dir)
        beside.rename(folder)
    except OSError as error:
        # Another process may have been faster: its folder is there, and holds the same.
        if not (folder / "index.json").is_file():
            raise CalmError(f"data.cache_dir {cache_dir}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _build(
    folder: pathlib.Path,
    entry: Mapping[str, Any],
    data: Mapping[str, Any],
    split: str,
    vocabulary: Vocabulary,
    cache_dir: pathlib.Path,
) -> None:
    parts = []
    for number, (task, rate) in enumerate(ready_tasks(entry, split, vocabulary, cache_dir)):
        (folder / str(number)).mkdir()
        counts = _write_part(folder / str(number), task, split, data, vocabulary)
        if not counts["rows"]:
            raise CalmError(f"{task.name}: the split {split!r} has no examples")
        parts.append({"name": task.name, "rate": rate, **counts})
    _cuts(parts, data, entry)  # nothing is kept of what is refused
    index = {"entry": dict(entry), "split": split, "length": data["length"], "parts": parts}
    (folder / "index.json").write_text(json.dumps(index, indent=2) + "\n")


def ready_tasks(
    entry: Mapping[str, Any], split: str, vocabulary: Vocabulary, cache_dir: pathlib.Path
) -> list[tuple[Any, float]]:
    """The seqio Tasks of an entry, with their shares, ready to be read in `vocabulary`.

    Imports TensorFlow. Raises `CalmError` for an unknown task or split, or a bad line.
    """
    if "jsonl" in entry:
        return [(jsonl.task(entry["jsonl"], vocabulary), 1.0)]
    from calm_jax.data import tasks

    found = []
    for task, rate in tasks.find(entry["task"], entry.get("import", "")):
        tasks.make_ready(task, cache_dir / "tfds")
        if split not in task.splits:
            known = ", ".join(sorted(task.splits))
            raise CalmError(f"task {task.name!r} has no split {split!r}; it has {known}")
        found.append((tasks.with_vocabulary(task, vocabulary), rate))
    return found


def _write_part(
    folder: pathlib.Path,
    task: Any,
    split: str,
    data: Mapping[str, Any],
    vocabulary: Vocabulary,
) -> dict[str, int]:
    counts = {"examples": 0, "rows": 0, "cut": 0, "answers_lost": 0, "longest": 0}
    length = data["length"]
    total = task.num_input_examples(split)
    total = min(filter(None, (total, data["limit"])), default=None)
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(_RowWriter(folder / f"{name}.npy", length, dtype))
            for name, dtype in DTYPES.items()
        }
        progress = stack.enter_context(
            tqdm(total=total, desc=f"{task.name} {split}", unit=" examples")
        )
        for chunk in sequences(task, split, data["limit"]):
            lengths = [len(prompt) + len(answer) for prompt, answer in chunk]
            if vocabulary.rows is not None:
                for ids in itertools.chain.from_iterable(chunk):
                    check_ids(ids, vocabulary.rows, f"{task.name}:", vocabulary)
            rows = (_packed if data["pack"] else _padded)(chunk, length)
            for name, writer in writers.items():
                writer.append(rows[name])
            counts["examples"] += len(chunk)
            counts["rows"] += len(rows["targets"])
            counts["cut"] += sum(n > length for n in lengths)
            counts["answers_lost"] += sum(len(prompt) >= length for prompt, _ in chunk)
            counts["longest"] = max(counts["longest"], *lengths)
            progress.update(len(chunk))
    return counts


def sequences(task: Any, split: str, limit: int) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Chunks of (prompt ids, answer ids) of a seqio Task, in its order; `limit` 0 is all."""
    dataset = task.get_dataset(None, split, shuffle=False)
    if limit:
        dataset = dataset.take(limit)
    names = [name for name in ("inputs", "targets") if name in dataset.element_spec]
    dataset = dataset.map(lambda example: {name: example[name] for name in names})
    empty = np.zeros(0, np.int32)
    for batch in dataset.ragged_batch(PACK_CHUNK).prefetch(1):
        columns = {name: _rows_of(ids) for name, ids in batch.items()}
        prompts = columns.get("inputs", [empty] * len(columns["targets"]))
        yield list(zip(prompts, columns["targets"], strict=True))


def _rows_of(ids: Any) -> list[np.ndarray]:
    return np.split(ids.flat_values.numpy(), ids.row_splits.numpy()[1:-1])


def _columns(prompt: np.ndarray, answer: np.ndarray, length: int) -> np.ndarray:
    """Target ids and whether they are of the prompt, int32 [≤ length, 2]."""
    ids = np.concatenate([prompt, answer])[:length]
    return np.stack([ids, np.arange(len(ids)) < len(prompt)], axis=1).astype(np.int32)


def _packed(chunk: list[tuple[np.ndarray, np.ndarray]], length: int) -> dict[str, np.ndarray]:
    import grain

    examples = [{"row": _columns(*pair, length)} for pair in chunk]
    dataset = grain.MapDataset.source(examples).to_iter_dataset(grain.ReadOptions(num_threads=0))
    packed = grain.experimental.FirstFitPackIterDataset(
        dataset, length_struct={"row": length}, num_packing_bins=PACK_ROWS, shuffle_bins=False
    )
    rows = list(packed)
    columns = np.stack([row["row"] for row in rows])
    segments = np.stack([row["row_segment_ids"] for row in rows])
    return {"targets": columns[..., 0], "segment_ids": segments, "prompt": columns[..., 1]}


def _padded(chunk: list[tuple[np.ndarray, np.ndarray]], length: int) -> dict[str, np.ndarray]:
    rows = {name: np.zeros((len(chunk), length), dtype) for name, dtype in DTYPES.items()}
    for i, pair in enumerate(chunk):
        columns = _columns(*pair, length)
        rows["targets"][i, : len(columns)], rows["prompt"][i, : len(columns)] = columns.T
        rows["segment_ids"][i, : len(columns)] = 1
    return rows


class _RowWriter:
    """Appends rows [?, T] to a .npy file whose number of rows is known only at the end."""

    def __init__(self, path: pathlib.Path, length: int, dtype: type):
        self._file = open(path, "wb")  # noqa: SIM115 (`__exit__` closes it)
        self._length, self._dtype, self._rows = length, np.dtype(dtype), 0
        self._header()

    def _header(self) -> None:
        # numpy leaves room in the header for the first axis to grow: its length stays the same.
        shape = (self._rows, self._length)
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, description)

    def append(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self._rows += len(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._file:
            self._file.seek(0)
            self._header()
