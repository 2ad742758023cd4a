"""Scoring a model: every example of its tasks is answered, compared and written down."""

import contextlib
import dataclasses
import datetime
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from calm_jax import sharding
from calm_jax.checkpoints.any_model import load_model
from calm_jax.checkpoints.files import absolute, check_writable, read_json, write_json
from calm_jax.checkpoints.kinds import COMPOSED_RUN, DECODER_RUN, FROZEN, kind_of
from calm_jax.data.entries import files_of, identity
from calm_jax.errors import CalmError
from calm_jax.evaluation import metric_table, own_prompts
from calm_jax.evaluation.answering import Options, answers, models_by_name, shot_texts
from calm_jax.evaluation.attention import attention
from calm_jax.evaluation.results import (
    PARTS,
    SCORED,
    evaluation_folder,
    part_folder,
    predictions_file,
    read_optional,
    write_json_lines,
)
from calm_jax.evaluation.scored_model import scored_model
from calm_jax.evaluation.tasks.registry import open_tasks
from calm_jax.evaluation.tasks.task import Task
from calm_jax.evaluation.variants import Variant
from calm_jax.models import ComposedDecoder

BATCH_SIZE = 128
DEFAULTS = {"tasks": (), "limit": 0, "max_new_tokens": 32}  # of a model that is not a run


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
    options: Options | None = None,
    variant: Variant | None = None,
    output: epath.PathLike | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Scores a model on tasks and writes every prediction.

    `output` then holds each task's predictions with their metadata (`TASK.jsonl`, with `_` for the
    `/` in its name), `shots.json` with the shots of each task that has some, `attention.json` of a
    composed model (one prompt), the predictions of the parts in folders of their own, and last
    `summary.json`. Where that already describes the same checkpoint, settings and files, nothing is
    done.

    Args:
        model: the directory of a run, a frozen folder or an exported bridge.
        step: which checkpoint of a composed run; default: the best by validation. A decoder's run
            has one finished model, its frozen folder.
        anchor, augments: folders of the frozen models, where these have moved.
        tasks: names of `tasks.registry`, such as "mgsm/sw+th:FOLDER", names of seqio Tasks with a
            test split, or files of JSON lines; default: the run's `evaluate.tasks`, or, where that
            is empty, the files of its validation data.
        limit: examples of each task at most, 0 for all; default: the run's `evaluate.limit`, or 0.
        max_new_tokens: length of an answer at most, in tokens, of seqio Tasks and files; default:
            the run's `evaluate.max_new_tokens`, or 32.
        columns: of the files, as in an entry of `config.data`: {"inputs": "question", …}; default:
            those of the run's validation data.
        mesh: sizes of the mesh axes, as in a run's config; default: the first device alone.
        batch_size: prompts answered at once at most.
        parts: also scores the anchor and each augment of a composed model alone.
        options: how tasks are asked otherwise.
        variant: what is scored in the model's place.
        output: where the results go; default: `evaluation/` in the model's folder, and in it a
            folder of the variant's name.
        command: the command line that asks for it, kept in summary.json for the report.

    Returns:
        what `metric_table.score` says of each task, by name; under "_run" what was scored, when
        and on what; under "_parts" the same scores of each part.

    Raises:
        CalmError: no model, an unknown step or task, a task without examples, or one that this
            machine cannot judge, an option that no task uses, parts of a model that has none, or a
            folder that cannot be written.
    """
    folder = absolute(model)
    config = read_json(folder / "config.json", "a run, a frozen folder or an exported bridge")
    kind = kind_of(config)
    if parts and kind in (DECODER_RUN, FROZEN):
        raise CalmError(f"{folder} is {kind}: it has no parts to score")
    given = {"tasks": tasks, "limit": limit, "max_new_tokens": max_new_tokens}
    of_run = DEFAULTS | config.get("evaluate", {})
    settings = {key: of_run[key] if value is None else value for key, value in given.items()}
    settings["tasks"] = list(settings["tasks"] or own_prompts.validation_files(config))
    variant = variant or Variant()
    variant.check(kind, folder)
    output = absolute(output) if output else evaluation_folder(folder) / variant.name
    if not settings["tasks"]:
        raise CalmError(f"{folder}: there is nothing to score; name a task or a file by --tasks")
    which = scored_model(folder, step)
    options = options or Options()
    tasks = {name: _limited(open_tasks(name), settings["limit"]) for name in settings["tasks"]}
    entries = {
        name: own_prompts.entry_of(name, config, columns)
        for name, of_name in tasks.items()
        if of_name is None
    }
    if columns and not any(map(files_of, entries.values())):
        raise CalmError(f"--columns names columns of files, and {', '.join(tasks)} is no file")
    opened = [task for of_name in tasks.values() for task in of_name or ()]
    _check_options(options, opened, entries)
    _check_names(tasks, output)
    scored = {
        **which,
        **settings,
        "options": _told(options),
        "files": [
            *map(identity, entries.values()),
            *([task.name, task.fingerprint(options.shots, options.seed)] for task in opened),
        ],
    }
    if variant.name:
        scored["variant"] = variant.described()
    before = read_optional(output / "summary.json")
    earlier = before.get(SCORED, {})
    is_same = scored.items() <= earlier.items() and ("variant" in scored) == ("variant" in earlier)
    if is_same and (PARTS in before or not parts):
        return before
    check_writable(output)

    built = None if mesh is None else sharding.make_mesh(mesh)
    with contextlib.nullcontext() if built is None else jax.set_mesh(built):
        loaded = load_model(
            folder,
            step=which["step"] if kind == COMPOSED_RUN else None,
            mesh=built,
            anchor=anchor,
            augments=augments,
        )
        models = models_by_name(loaded, parts=parts)  # a variant leaves the parts as they are
        loaded = models[""] = variant.changed(loaded, built)
        handing = variant.handing(built)
        own = functools.partial(
            own_prompts.task_of, config=config, settings=settings, options=options
        )
        asked = [
            task
            for name, of_name in tasks.items()
            for task in of_name or [own(loaded, name, entries[name])]
        ]
        said = {
            name: answers(
                one,
                name,
                [own_prompts.of_part(task, one, loaded, entries, own) for task in asked],
                options,
                batch_size,
                Variant() if name else variant,
                None if name else handing,
            )
            for name, one in models.items()
        }
        # Until the new summary is written, none describes predictions that are not its own.
        (output / "summary.json").unlink(missing_ok=True)
        for name, of_model in said.items():
            for task, records in of_model.items():
                write_json_lines(predictions_file(part_folder(output, name), task), records)
        _write_or_remove(
            output / "shots.json",
            {task.name: shots for task in asked if (shots := shot_texts(task, options))},
        )
        if isinstance(loaded, ComposedDecoder) and not variant.name:
            _write_or_remove(output / "attention.json", attention(loaded, said[""]))
    scores = {
        name: {
            task.name: metric_table.score(of_model[task.name], _metrics(task, options))
            | ({"group": task.group} if task.group else {})
            for task in asked
        }
        for name, of_model in said.items()
    }
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    summary = {SCORED: {**scored, "date": now, "device": device, "command": command}}
    summary |= scores.pop("") | ({PARTS: scores} if parts else {})
    write_json(output / "summary.json", summary)
    return summary


def _check_names(tasks: Mapping[str, Sequence[Task] | None], output: epath.Path) -> None:
    """Raises `CalmError` if the predictions of two tasks would share one file."""
    named: dict[epath.Path, str] = {}
    for name, of_name in tasks.items():
        for task in [name] if of_name is None else [task.name for task in of_name]:
            other = named.setdefault(predictions_file(output, task), name)
            if other != name:
                raise CalmError(f"predictions of {other} and {name} would be one file; rename one")


def _limited(tasks: Sequence[Task] | None, limit: int) -> list[Task] | None:
    if tasks is None or not limit:
        return tasks
    return [dataclasses.replace(task, examples=task.examples[:limit]) for task in tasks]


def _check_options(
    options: Options, tasks: Sequence[Task], entries: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raises `CalmError` for what no task would use, and tasks that cannot be judged here."""
    for name in options.metrics:
        if name not in metric_table.OF_ANSWERS:
            known = ", ".join(metric_table.OF_ANSWERS)
            raise CalmError(f"--metric={name}: of prompts with answers, there are {known}")
    if "" in options.stop:
        raise CalmError("--stop='' would end every answer before its first character")
    for flag, what, given, default in (
        ("metric", "metrics", options.metrics, Options.metrics),
        ("stop", "ends", options.stop, Options.stop),
    ):
        if not entries and given != default:
            shown = ",".join(given).replace("\n", "\\n")
            raise CalmError(
                f"--{flag}={shown}: no task in --tasks is a file or a seqio Task; the "
                f"others have {what} of their own"
            )
    if options.samples > 1 and not any("pass@1" in task.metrics for task in tasks):
        raise CalmError(f"--samples={options.samples}: no task in --tasks is scored by pass@k")
    if options.shots and entries:
        raise CalmError(f"{next(iter(entries))} has no split to draw --shots={options.shots} from")
    for task in tasks:
        task.drawn(options.shots, options.seed)
        if task.needs is not None:
            task.needs()


def _told(options: Options) -> dict[str, Any]:
    """The options as JSON values, without those that say nothing."""
    told = dataclasses.asdict(options) | {"metrics": list(options.metrics)}
    stop = told.pop("stop")
    return told | ({"stop": list(stop)} if stop else {})


def _metrics(task: Task, options: Options) -> tuple[str, ...]:
    """The task's metrics; pass@k for as many answers as there are."""
    more = [k for k in (10, 100) if k <= options.samples] if "pass@1" in task.metrics else []
    return (*task.metrics, *(f"pass@{k}" for k in more))


def _write_or_remove(path: epath.Path, value: Any) -> None:
    if value:
        write_json(path, value)
    else:
        path.unlink(missing_ok=True)
