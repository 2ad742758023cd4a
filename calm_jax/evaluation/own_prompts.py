"""A user's own prompts as tasks: files, and seqio Tasks, as they stand."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from calm_jax import data
from calm_jax.data.entries import files_of, named_entry
from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError
from calm_jax.evaluation import metrics
from calm_jax.evaluation.answering import Options
from calm_jax.evaluation.tasks.prompts import TEMPLATES
from calm_jax.evaluation.tasks.task import Task

SPLIT = "test"
log = logging.getLogger("absl")


def validation_files(config: Mapping[str, Any]) -> list[str]:
    return list(filter(None, map(files_of, config.get("data", {}).get("validation", ()))))


def entry_of(
    task: str, config: Mapping[str, Any], columns: Mapping[str, str] | None
) -> Mapping[str, Any]:
    """What a name stands for: files that the run validates on are read as it reads them, and a
    seqio Task that it trains or validates on comes from the same module."""
    entry = named_entry(task)
    if columns and files_of(entry):
        return {**entry, "columns": dict(columns)}
    data_of = config.get("data", {})
    known = [*data_of.get("validation", ())]
    if "task" in entry:
        known += data_of.get("train", ())
    return next((one for one in known if task in (files_of(one), one.get("task"))), entry)


def task_of(
    model,
    name: str,
    entry: Mapping[str, Any],
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    options: Options,
) -> Task:
    """A seqio Task or a user's file: prompts and answers as they stand."""
    examples = examples_of(model, name, entry, config, settings, options.metrics)
    room = settings["max_new_tokens"]
    # Braces in a template name fields of an example.
    stop = tuple(text.replace("{", "{{").replace("}", "}}") for text in options.stop)
    template = dataclasses.replace(TEMPLATES["own"], stop=stop)
    return Task(name, examples, template, options.metrics, max_new_tokens=room)


def of_part(
    task: Task,
    part: Any,
    whole: Any,
    entries: Mapping[str, Mapping[str, Any]],
    own: Callable[..., Task],
) -> Task:
    """A task for a part alone: a part with a tokenizer of its own has its own chat template, and
    other answers that it can write."""
    theirs, ours = part.vocabulary, whole.vocabulary
    if task.name not in entries or theirs.tokenization_fingerprint == ours.tokenization_fingerprint:
        return task
    try:
        return own(part, task.name, entries[task.name])
    except CalmError as error:
        log.warning(
            "%s: a part alone gets the pair's prompts, since its own fail: %s", task.name, error
        )
        return task


def examples_of(
    model,
    task: str,
    entry: Mapping[str, Any],
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    by: Sequence[str] = Options.metrics,
) -> list[dict[str, Any]]:
    """The examples of a task; of exact match after a check that every answer can be right."""
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
    exact = by[0] == "exact_match"
    lengths = [_write_target(one, vocabulary) for one in examples if exact or one.get("is_turn")]
    if not exact:
        return examples
    if (longest := max(lengths)) > room:
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
