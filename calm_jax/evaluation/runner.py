"""Scoring a run: every example of its tasks is answered, compared and written down."""

import contextlib
import datetime
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from calm_jax import data, sharding
from calm_jax.checkpoints.any_model import load_model
from calm_jax.checkpoints.files import absolute, read_json, write_json
from calm_jax.checkpoints.training import TrainingCheckpoints
from calm_jax.data.opening import identity
from calm_jax.decoding import generate
from calm_jax.errors import CalmError
from calm_jax.evaluation import metrics
from calm_jax.evaluation.results import (
    MADE,
    evaluation_folder,
    predictions_file,
    read_optional,
    write_json_lines,
)
from calm_jax.models import ComposedDecoder

SPLIT = "test"
BATCH_SIZE = 128
log = logging.getLogger("absl")
ATTENTION_TOKENS = 32  # of the expression whose attention is kept: more are not legible
Records = list[dict[str, Any]]


def evaluate(
    workdir: epath.PathLike,
    *,
    step: int | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    mesh: Mapping[str, int] | None = None,
    batch_size: int = BATCH_SIZE,
) -> dict[str, Any]:
    """Scores a run by exact match and writes `evaluation/` in its directory.

    There come to lie: every prediction of a task with its metadata (`TASK.jsonl`, with `_` for the
    `/` in its name), `attention.json` of a composed model (one expression), and last
    `summary.json`. Where that stands already for the same checkpoint, settings and files of JSON
    lines, nothing is done.

    Args:
        workdir: a run's directory.
        step: which checkpoint of a composed run; default: the best by validation. A decoder's run
            has one finished model, its frozen folder.
        tasks: names of Tasks with a test split, or files of JSON lines; default: the config's
            `evaluate.tasks`, or, where that is empty, the files of its validation data.
        limit: examples of each task at most, 0 for all; default: `evaluate.limit`.
        max_new_tokens: length of an answer at most; default: `evaluate.max_new_tokens`.
        mesh: sizes of the mesh axes, as in a run's config; default: the first device alone.
        batch_size: prompts answered at once.

    Returns:
        `{task: {"exact_match": percent, "count": n, "interval": [low, high]}}`, and under "_run"
        what was scored, when and on what.

    Raises:
        CalmError: no run, no finished model, an unknown step or task, a task without examples, or a
            directory that cannot be written.
    """
    folder = absolute(workdir)
    config = read_json(folder / "config.json", "a run")
    given = {"tasks": tasks, "limit": limit, "max_new_tokens": max_new_tokens}
    settings = {
        key: config.get("evaluate", {}).get(key) if value is None else value
        for key, value in given.items()
    }
    settings["tasks"] = list(settings["tasks"] or validation_files(config))
    if not settings["tasks"]:
        raise CalmError(f"{folder}: evaluate.tasks is empty; name a task, or a file of JSON lines")
    named: dict[epath.Path, str] = {}
    for task in settings["tasks"]:
        other = named.setdefault(predictions_file(folder, task), task)
        if other != task:
            raise CalmError(f"predictions of {other} and {task} would be one file; rename one")
    step = _step(folder, config, step)
    files = [task for task in settings["tasks"] if task.endswith(".jsonl")]
    scored = {"step": step, **settings, "files": [identity({"jsonl": file}) for file in files]}
    before = read_optional(evaluation_folder(folder) / "summary.json")
    if scored.items() <= before.get(MADE, {}).items():
        return before

    with _mesh(mesh) as built:
        model = load_model(folder, step=step if config["kind"] == "composed" else None, mesh=built)
        examples = {task: _examples(model, task, config, settings) for task in settings["tasks"]}
        answers = {
            task: _answers(model, task, asked, settings["max_new_tokens"], batch_size)
            for task, asked in examples.items()
        }
        # Until the new one stands, no summary speaks of predictions that are not its own.
        (evaluation_folder(folder) / "summary.json").unlink(missing_ok=True)
        for task, records in answers.items():
            write_json_lines(predictions_file(folder, task), records)
        if isinstance(model, ComposedDecoder):
            write_json(evaluation_folder(folder) / "attention.json", _attention(model, answers))
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    summary = {MADE: {**scored, "date": now, "device": device}}
    summary |= {task: metrics.score(records) for task, records in answers.items()}
    write_json(evaluation_folder(folder) / "summary.json", summary)
    return summary


def validation_files(config: Mapping[str, Any]) -> list[str]:
    entries = config.get("data", {}).get("validation", ())
    return [entry["jsonl"] for entry in entries if "jsonl" in entry]


def _step(folder: epath.Path, config: Mapping[str, Any], step: int | None) -> int:
    """The checkpoint to score."""
    if not (folder / "checkpoints").exists():
        raise CalmError(f"{folder} has no checkpoint yet")
    with TrainingCheckpoints(folder / "checkpoints", read_only=True) as checkpoints:
        best = checkpoints.best
    if best is None:
        raise CalmError(f"{folder} has no checkpoint yet")
    if config["kind"] == "decoder" and step not in (None, best):
        raise CalmError(
            f"--step={step}: a decoder's run is scored by its frozen folder, step {best}"
        )
    return best if step is None else step


@contextlib.contextmanager
def _mesh(shape: Mapping[str, int] | None) -> Iterator[jax.sharding.Mesh | None]:
    if shape is None:
        yield None
        return
    mesh = sharding.make_mesh(shape)
    with jax.set_mesh(mesh):
        yield mesh


def _examples(model, task: str, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Records:
    """The examples of a task, once it is sure that all of them can be answered right."""
    vocabulary, room = model.vocabulary, settings["max_new_tokens"] or 0
    if vocabulary is None:
        raise CalmError(f"the model has no vocabulary to write {task} in")
    place = config.get("data", {}).get("cache_dir", "")
    examples = data.evaluation_examples(task, SPLIT, vocabulary, settings["limit"] or 0, place)
    if not examples:
        raise CalmError(f"task {task} has no example in its {SPLIT} split")
    found = len(examples)
    examples = [example for example in examples if example["inputs"]]
    if not examples:
        raise CalmError(f"{task}: none of {found} examples has a prompt whose answer can be scored")
    if len(examples) < found:
        log.warning("%s: %d of %d have no prompt to answer", task, found - len(examples), found)
    for example in examples:
        if example.get("is_turn"):  # what the template writes to end a turn is never decoded
            example["targets"] = vocabulary.decode(vocabulary.encode(example["targets"]))
    longest = max(len(vocabulary.encode(example["targets"])) for example in examples) + 1
    if longest > room:
        raise CalmError(
            f"evaluate.max_new_tokens is {room}, but an answer of {task} with its end token has "
            f"{longest}"
        )
    return examples


def _answers(model, task: str, examples: Records, max_new_tokens: int, batch_size: int) -> Records:
    """The examples, in their order, with "prediction" and "correct"."""
    vocabulary = model.vocabulary
    lengths = [len(vocabulary.encode(example["inputs"])) for example in examples]
    # Like lengths together, and the last batch filled up: few shapes, so few compilations.
    order = np.argsort(lengths, kind="stable")
    predictions: dict[int, str] = {}
    with tqdm(total=len(examples), desc=task, unit="example") as progress:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            prompts = [examples[row]["inputs"] for row in np.resize(rows, batch_size)]
            tokens_BN = generate(model, prompts, max_new_tokens=max_new_tokens)
            for row, tokens_N in zip(rows, tokens_BN[: len(rows)], strict=True):
                predictions[row] = vocabulary.decode(tokens_N)
            progress.update(len(rows))
    return [
        {
            **example,
            "prediction": predictions[row],
            "correct": metrics.is_exact_match(predictions[row], example["targets"]),
        }
        for row, example in enumerate(examples)
    ]


def _attention(model: ComposedDecoder, answers: Mapping[str, Records]) -> dict[str, Any]:
    """What each connection attends to in one prompt, as a mean over heads.

    The prompt is the first that was answered right, of MATH where there is such a set.
    """
    records = [record for of_task in answers.values() for record in of_task]
    example = min(records, key=lambda record: (not record["correct"], record.get("set") != "math"))
    vocabulary = model.vocabulary
    ids = [vocabulary.start_id, *vocabulary.encode(example["inputs"])][:ATTENTION_TOKENS]
    tokens_1T = np.array([ids], np.int32)
    maps = model.attention_maps(tokens_1T, prompt_mask_BT=np.ones_like(tokens_1T))
    names = vocabulary.tokens()
    return {
        "inputs": example["inputs"],
        "tokens": [names[token] for token in ids],
        "connections": [
            {
                "augment": found["augment"],
                "from": found["from"],
                "to": found["to"],
                "weights": np.round(np.asarray(found["weights"])[0].mean(0), 4).tolist(),
            }
            for found in maps
        ],
    }
