"""Rows on disk: written once, then read by index without TensorFlow.

A cache is a folder, named by a hash of all that determines its content:

    index.json            the parts (one for a Task, several for a Mixture), with counts
    0/inputs.npy          int32 [N, T] input ids
    0/targets.npy         int32 [N, T] the ids that they predict
    0/segment_ids.npy     int32 [N, T] 1, 2, … for the sequences of a row, 0 for padding
    0/prompt.npy          uint8 [N, T] 1 where the target belongs to the prompt
    0/augment_…_….npy     int32 [N, S] the arrays of `dataset.own_keys` for each augment with tokens
                          of its own

The folder is written under another name and renamed when it is complete.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from calm_jax.data.dataset import DTYPES, own_keys
from calm_jax.data.own_tokens import OwnTokens
from calm_jax.data.rows import RowWriter, Sequences
from calm_jax.errors import CalmError

FORMAT = 4

INDEX_FILE = "index.json"


def cache_directory(setting: str = "") -> pathlib.Path:
    """The cache, on a local disk: `setting`, else `$CALM_CACHE`, else `~/.cache/calm_jax`."""
    return pathlib.Path(setting or os.environ.get("CALM_CACHE") or "~/.cache/calm_jax").expanduser()


def ready_folder(
    cache_dir: pathlib.Path,
    determines: Sequence[Any],
    build: Callable[[pathlib.Path], dict[str, Any]],
) -> tuple[pathlib.Path, dict[str, Any]]:
    """The folder of the content that JSON values determine, and its index; built if missing.

    `build` writes the content into a folder and returns the index. Raises `CalmError` if the folder
    cannot be written, or as `build`; then nothing is left.
    """
    fingerprint = hashlib.sha256(json.dumps([FORMAT, *determines]).encode()).hexdigest()[:24]
    folder = cache_dir / "tokens" / fingerprint
    if not (folder / INDEX_FILE).is_file():
        beside = folder.with_name(f"{fingerprint}.incomplete.{uuid.uuid4().hex}")
        try:
            beside.mkdir(parents=True)
            (beside / INDEX_FILE).write_text(json.dumps(build(beside), indent=2) + "\n")
            beside.rename(folder)
        except OSError as error:
            # Another process may have finished first; its folder has the same content.
            if not (folder / INDEX_FILE).is_file():
                raise CalmError(f"data.cache_dir {cache_dir}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder, json.loads((folder / INDEX_FILE).read_text())


def write_part(
    folder: pathlib.Path,
    chunks: Iterable[Sequences],
    length: int,
    pack: bool,
    augments: Sequence[OwnTokens] = (),
) -> dict[str, Any]:
    """Writes sequences as rows of `length` ids, packed or one in each row; returns statistics.

    Sequences longer than a row continue in further rows if they have no prompt; else they are cut.
    The statistics are the numbers of `examples`, of `rows`, of sequences that are `cut` and of
    those whose prompt alone fills a row (`answers_lost`), the ids of the `longest` that is cut,
    `digest`, the SHA-256 of the rows, and for each of `augments` the `cut` and `longest` of its own
    tokens. Raises `CalmError` as `OwnTokens.of`.
    """
    counts: dict[str, Any] = {"examples": 0, "rows": 0, "cut": 0, "answers_lost": 0, "longest": 0}
    counts["augments"] = [{"cut": 0, "longest": 0} for _ in augments]
    widths = {name: (length, dtype) for name, dtype in DTYPES.items()}
    for augment in augments:
        widths |= dict.fromkeys(own_keys(augment.number), (augment.length, np.int32))
    digest = hashlib.sha256()
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(RowWriter(folder / f"{name}.npy", *width))
            for name, width in widths.items()
        }
        for chunk in chunks:
            counts["examples"] += len(chunk)
            chunk = chunk.continued(length)
            kept = chunk.cut(length)
            own = [
                augment.of(kept, of)
                for augment, of in zip(augments, counts["augments"], strict=True)
            ]
            rows = kept.rows(length, pack, own)
            for name, writer in writers.items():
                digest.update(rows[name])
                writer.append(rows[name])
            counts["rows"] += len(rows["targets"])
            counts["cut"] += int((chunk.lengths_N > length).sum())
            counts["answers_lost"] += int((chunk.prompts_N >= length).sum())
            counts["longest"] = max(counts["longest"], int(chunk.lengths_N.max(initial=0)))
    return counts | {"digest": digest.hexdigest()}


def read_part(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays that `write_part` wrote, memory-mapped."""
    own = sorted(path.stem for path in folder.glob("*.npy") if path.stem not in DTYPES)
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in [*DTYPES, *own]}
