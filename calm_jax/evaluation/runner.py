"""Scoring a model: every example of its tasks is answered, compared and written down."""

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
from calm_jax.checkpoints.files import absolute, check_writable, read_json, write_json
from calm_jax.checkpoints.kinds import COMPOSED_RUN, DECODER_RUN, FROZEN, kind_of
from calm_jax.checkpoints.training import TrainingCheckpoints
from calm_jax.data.entries import files_of, identity, named_entry
from calm_jax.data.vocabulary import Vocabulary
from calm_jax.decoding import Generator, Sampling
from calm_jax.decoding.blocks import in_blocks
from calm_jax.errors import CalmError
from calm_jax.evaluation import metrics
from calm_jax.evaluation.results import (
    PARTS,
    SCORED,
    evaluation_folder,
    part_folder,
    part_names,
    predictions_file,
    read_optional,
    write_json_lines,
)
from calm_jax.models import ComposedDecoder, Inputs

SPLIT = "test"
BATCH_SIZE = 128
DEFAULTS = {"tasks": (), "limit": 0, "max_new_tokens": 32}  # of a model that is not a run
log = logging.getLogger("absl")
ATTENTION_TOKENS = 32  # of the prompt whose attention is kept: more are not legible
Records = list[dict[str, Any]]


def evaluate(
    model: epath.PathLike,
    *,
    step: int | None = None,
    anchor: epath.PathLike | None = None,
    augments: Sequence[epath.PathLike] | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    columns: Mapping[str, str] | None = None,
    mesh: Mapping[str, int] | None = None,
    batch_size: int = BATCH_SIZE,
    parts: bool = False,
    output: epath.PathLike | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Scores a model by exact match and writes every prediction.

    `output` then holds each task's predictions with their metadata (`TASK.jsonl`, with `_` for the
    `/` in its name), `attention.json` of a composed model (one prompt), the predictions of the
    parts in folders of their own, and last `summary.json`. Where that already describes the same
    checkpoint, settings and files of JSON lines, nothing is done.

    Args:
        model: the directory of a run, a frozen folder or an exported bridge.
        step: which checkpoint of a composed run; default: the best by validation. A decoder's run
            has one finished model, its frozen folder.
        anchor, augments: folders of the frozen models, where these have moved.
        tasks: names of Tasks with a test split, or files of JSON lines; default: the run's
            `evaluate.tasks`, or, where that is empty, the files of its validation data.
        limit: examples of each task at most, 0 for all; default: the run's `evaluate.limit`, or 0.
        max_new_tokens: length of an answer at most, in tokens; default: the run's
            `evaluate.max_new_tokens`, or 32.
        columns: of the files, as in an entry of `config.data`: {"inputs": "question", …}; default:
            those of the run's validation data.
        mesh: sizes of the mesh axes, as in a run's config; default: the first device alone.
        batch_size: prompts answered at once at most.
        parts: also scores the anchor and each augment of a composed model alone.
        output: where the results go; default: `evaluation/` in the model's folder.
        command: the command line that asks for it, kept in summary.json for the report.

    Returns:
        what `metrics.score` says of each task, by name; under "_run" what was scored, when and on
        what; under "_parts" the same scores of each part.

    Raises:
        CalmError: no model, an unknown step or task, a task without examples, parts of a model that
            has none, or a folder that cannot be written.
    """
    folder = absolute(model)
    config = read_json(folder / "config.json", "a run, a frozen folder or an exported bridge")
    kind = kind_of(config)
    if parts and kind in (DECODER_RUN, FROZEN):
        raise CalmError(f"{folder} is {kind}: it has no parts to score")
    given = {"tasks": tasks, "limit": limit, "max_new_tokens": max_new_tokens}
    of_run = DEFAULTS | config.get("evaluate", {})
    settings = {key: of_run[key] if value is None else value for key, value in given.items()}
    settings["tasks"] = list(settings["tasks"] or validation_files(config))
    output = absolute(output) if output else evaluation_folder(folder)
    _check_tasks(settings["tasks"], folder, output)
    step = _step(folder, config, step)
    entries = {task: _entry(task, config, columns) for task in settings["tasks"]}
    scored = {
        "step": step,
        "fingerprint": config.get("fingerprint"),
        **settings,
        "files": [identity(entry) for entry in entries.values() if files_of(entry)],
    }
    before = read_optional(output / "summary.json")
    is_same = scored.items() <= before.get(SCORED, {}).items()
    if is_same and (PARTS in before or not parts):
        return before
    check_writable(output)

    with _mesh(mesh) as built:
        loaded = load_model(
            folder,
            step=step if kind == COMPOSED_RUN else None,
            mesh=built,
            anchor=anchor,
            augments=augments,
        )
        models = {"": loaded}
        if parts:
            names = part_names(len(loaded.augments))
            models |= zip(names, (loaded.anchor, *loaded.augments), strict=True)
        examples = {
            task: _examples(loaded, task, entry, config, settings)
            for task, entry in entries.items()
        }
        answers = {
            name: _answers(one, loaded.vocabulary, name, examples, settings, batch_size)
            for name, one in models.items()
        }
        # Until the new summary is written, none describes predictions that are not its own.
        (output / "summary.json").unlink(missing_ok=True)
        for name, of_model in answers.items():
            for task, records in of_model.items():
                write_json_lines(predictions_file(part_folder(output, name), task), records)
        if isinstance(loaded, ComposedDecoder):
            write_json(output / "attention.json", _attention(loaded, answers[""]))
    scores = {
        name: {task: metrics.score(records) for task, records in of_model.items()}
        for name, of_model in answers.items()
    }
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    summary = {SCORED: {**scored, "date": now, "device": device, "command": command}}
    summary |= scores.pop("") | ({PARTS: scores} if parts else {})
    write_json(output / "summary.json", summary)
    return summary


def _check_tasks(tasks: Sequence[str], folder: epath.Path, output: epath.Path) -> None:
    """Raises `CalmError` without a task, or where predictions of two would be one file."""
    if not tasks:
        raise CalmError(f"{folder}: there is nothing to score; name a task or a file by --tasks")
    named: dict[epath.Path, str] = {}
    for task in tasks:
        other = named.setdefault(predictions_file(output, task), task)
        if other != task:
            raise CalmError(f"predictions of {other} and {task} would be one file; rename one")


def validation_files(config: Mapping[str, Any]) -> list[str]:
    """The files that a run validates on."""
    return list(filter(None, map(files_of, config.get("data", {}).get("validation", ()))))


def _entry(
    task: str, config: Mapping[str, Any], columns: Mapping[str, str] | None
) -> Mapping[str, Any]:
    """What a name stands for: files that the run validates on are read as it reads them."""
    if columns:
        return {**named_entry(task), "columns": dict(columns)}
    entries = config.get("data", {}).get("validation", ())
    return next((entry for entry in entries if files_of(entry) == task), None) or named_entry(task)


def _step(folder: epath.Path, config: Mapping[str, Any], step: int | None) -> int | None:
    """The checkpoint of a run to score; None of a model that is no run."""
    kind = kind_of(config)
    if kind not in (DECODER_RUN, COMPOSED_RUN):
        if step is not None:
            raise CalmError(f"--step={step}: {folder} is {kind}, which has no checkpoints")
        return None
    if not (folder / "checkpoints").exists():
        raise CalmError(f"{folder} has no checkpoint yet")
    with TrainingCheckpoints(folder / "checkpoints", read_only=True) as checkpoints:
        best = checkpoints.best
    if best is None:
        raise CalmError(f"{folder} has no checkpoint yet")
    if kind == DECODER_RUN and step not in (None, best):
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


def _examples(
    model,
    task: str,
    entry: Mapping[str, Any],
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Records:
    """The examples of a task, after a check that every answer has room to be right."""
    vocabulary, room = model.vocabulary, settings["max_new_tokens"]
    if vocabulary is None:
        raise CalmError(f"the model has no vocabulary to write {task} in")
    place = config.get("data", {}).get("cache_dir", "")
    examples = data.evaluation_examples(entry, SPLIT, vocabulary, settings["limit"], place)
    if not examples:
        raise CalmError(f"task {task} has no example in its {SPLIT} split")
    found = len(examples)
    examples = [example for example in examples if example["inputs"]]
    if not examples:
        raise CalmError(f"{task}: none of {found} examples has a prompt whose answer can be scored")
    if len(examples) < found:
        log.warning("%s: %d of %d have no prompt to answer", task, found - len(examples), found)
    longest = max(_write_target(example, vocabulary) for example in examples)
    if longest > room:
        raise CalmError(
            f"--max_new_tokens is {room}, but an answer of {task} with its end token has {longest}"
        )
    changed = [example for example in examples if "written" in example]
    if changed:
        log.warning(
            "%s: the vocabulary cannot write %d of %d answers exactly, such as %r, which it writes "
            "as %r; what it writes counts as right",
            task,
            len(changed),
            len(examples),
            changed[0]["targets"],
            changed[0]["written"],
        )
    return examples


def _write_target(example: dict[str, Any], vocabulary: Vocabulary) -> int:
    """Adds "written" where the target is not what its own tokens decode to; returns their number.

    No model can answer what its vocabulary cannot write, such as characters that it normalizes.
    """
    ids = vocabulary.encode(example["targets"])
    written = vocabulary.decode_after(vocabulary.encode_sequence(example["inputs"]), ids)
    if example.get("is_turn"):  # what the template writes to end a turn is never decoded
        example["targets"], ids = written, vocabulary.encode(written)
    elif not metrics.is_exact_match(written, example["targets"]):
        example["written"] = written
    return len(ids) + 1


def _answers(
    model,
    vocabulary: Vocabulary,
    name: str,
    examples: Mapping[str, Records],
    settings: Mapping[str, Any],
    batch_size: int,
) -> dict[str, Records]:
    """The examples of each task, with "prediction" and "correct"; `name` is shown meanwhile."""
    if model.vocabulary is None:  # an augment may have none, and then reads by the anchor's
        model.vocabulary = vocabulary
    prompts = {
        task: [model.vocabulary.encode_sequence(example["inputs"]) for example in asked]
        for task, asked in examples.items()
    }
    sampling = Sampling(max_new_tokens=settings["max_new_tokens"])
    # One for all tasks, since each length of its rows is compiled anew.
    generator = Generator(
        model,
        max_length=max(len(p) for asked in prompts.values() for p in asked)
        + sampling.max_new_tokens,
        slots=min(batch_size, max(map(len, prompts.values()))),
    )
    answers = {}
    for task, asked in prompts.items():
        shown, said = f"{name} {task}".strip(), []
        with tqdm(total=len(asked), desc=shown, unit="example") as progress:
            for prompt, (answer,) in zip(asked, in_blocks(generator, asked, sampling), strict=True):
                if answer.error is not None:
                    raise CalmError(f"{shown}: {answer.error}")
                said.append(vocabulary.decode_after(prompt, answer.tokens))
                progress.update()
        answers[task] = list(map(_judged, examples[task], said))
    return answers


def _judged(example: dict[str, Any], prediction: str) -> dict[str, Any]:
    targets = [example[key] for key in ("targets", "written") if key in example]
    correct = any(metrics.is_exact_match(prediction, target) for target in targets)
    return {**example, "prediction": prediction, "correct": correct}


def _attention(model: ComposedDecoder, answers: Mapping[str, Records]) -> dict[str, Any]:
    """What each connection attends to in one prompt, as a mean over heads.

    The prompt is the first that was answered right, of MATH where there is such a set.
    """
    records = [record for of_task in answers.values() for record in of_task]
    example = min(records, key=lambda record: (not record["correct"], record.get("set") != "math"))
    vocabulary = model.vocabulary
    ids = vocabulary.encode_sequence(example["inputs"])[:ATTENTION_TOKENS]
    tokens_1T = np.array([ids], np.int32)
    maps = model.attention_maps(Inputs(tokens_1T, prompt_mask_BT=np.ones_like(tokens_1T)))
    return {
        "inputs": example["inputs"],
        "tokens": _texts(vocabulary, ids),
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


def _texts(vocabulary: Vocabulary, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text: "�" is a part of a character; special tokens are named."""
    names, texts = vocabulary.tokens(), []
    start, before = 0, ""
    for end, token in enumerate(ids, start=1):
        text = vocabulary.decode(ids[start:end])
        added = text.removeprefix(before)
        texts.append("\ufffd" if "\ufffd" in added else added or names[token])
        before = text.rstrip("\ufffd")
        if token in vocabulary.eos_ids:  # decoding would stop at it: what follows starts anew
            start, before = end, ""
    return texts
