"""A model's answers to tasks: generated, chosen by probability, or only read."""

import dataclasses
import string
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from calm_jax.data.vocabulary import Vocabulary
from calm_jax.decoding import Generator, Sampling
from calm_jax.decoding.requests import in_common
from calm_jax.errors import CalmError
from calm_jax.evaluation import metric_table
from calm_jax.evaluation.controls import Recomputed
from calm_jax.evaluation.results import part_names
from calm_jax.evaluation.tasks.task import Task
from calm_jax.evaluation.variants import Variant

READ_AT_ONCE = 1024  # tokens of a long text, unless another context is given
CACHED_TOKENS = 2**16  # in all rows: 3 GB of keys and values of a model of 135M parameters
_BLOCK = 512  # continuations that are scored before the progress bar moves
NONE = Variant()
Records = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Options:
    """How tasks are asked, beyond what they say themselves.

    Attributes:
        metrics: that a user's own prompts are scored by, the main one first.
        stop: texts before which an answer to a user's own prompt ends.
        shots: of every prompt; None: as many as the task says.
        seed: that shots are drawn by, and answers.
        samples: answers to each problem whose score is pass@k.
        temperature, top_p: of generated answers.
        max_new_tokens: of an answer, of tasks that say it themselves.
        context: tokens of a prompt with its answer at most; 0: any number.
        drop_shots: whether shots that do not fit into it are left out.
    """

    metrics: tuple[str, ...] = ("exact_match",)
    stop: tuple[str, ...] = ()
    shots: int | None = None
    seed: int = 0
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    context: int = 0
    drop_shots: bool = False

    def __post_init__(self):
        if self.samples > 1 and not self.temperature:
            raise CalmError(
                f"--samples={self.samples}: without a temperature all of them are the same; give "
                "--temperature"
            )
        if self.drop_shots and not self.context:
            raise CalmError("--drop_shots needs --context=TOKENS, which they have to fit into")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt, in ids, with the continuations to score, if any, and its number of shots."""

    example: int  # the number of its example, of which a long text is several prompts
    prompt: list[int]
    continuations: list[list[int]]
    room: int
    shots: int
    text: str = ""
    handed: str | None = None  # the answer of another model that is in the prompt

    @property
    def length(self) -> int:
        return len(self.prompt) + self.room


def models_by_name(model: Any, *, parts: bool) -> dict[str, Any]:
    """The model under "", and with `parts` its anchor and augments by their `part_names`.

    An augment that has no vocabulary gets the anchor's.
    """
    models = {"": model}
    if parts:
        names = part_names(len(model.augments))
        models |= zip(names, (model.anchor, *model.augments), strict=True)
    for one in models.values():
        if one.vocabulary is None:
            one.vocabulary = model.vocabulary
    return models


def answers(
    model: Any,
    name: str,
    tasks: Sequence[Task],
    options: Options,
    batch_size: int,
    variant: Variant = NONE,
    handing: Any = None,
) -> dict[str, Records]:
    """The records of each task, by its name; `name` is that of the model, shown meanwhile.

    With `variant.hand_over`, `handing` is the decoder whose answers come into the prompts.

    A record has the example's fields but for those that "inputs", its question, shows; and
    "prediction", "correct" where the main metric finds it right or wrong, and what else the metrics
    need. Raises `CalmError` for a prompt that is longer than the context, and for a model without
    a vocabulary.
    """
    for what, one in ((f"the {name}" if name else "the model", model), ("--hand_over", handing)):
        if one is not None and one.vocabulary is None:
            raise CalmError(f"{what} has no vocabulary to write prompts in")
    asked = {task.name: list(_asked(task, model.vocabulary, options)) for task in tasks}
    if handing is not None:
        for task in tasks:
            of_task = asked[task.name]
            asked[task.name] = _handed_over(
                model, handing, task, of_task, variant, options, batch_size
            )
    every = [one for of_task in asked.values() for one in of_task]
    # One for all tasks, since each length of its rows is compiled anew.
    length = max(one.length for one in every)
    most = max(map(len, asked.values()))
    generator = variant.generator(model, length, rows(min(batch_size, most), length))
    return {task.name: _records(generator, task, asked[task.name], name, options) for task in tasks}


def rows(wanted: int, length: int) -> int:
    """How many prompts of this length are answered at once: fewer where they are long."""
    return max(1, min(wanted, CACHED_TOKENS // length))


def shot_texts(task: Task, options: Options) -> list[str]:
    """The texts before every question of a task, in order."""
    return [task.template.shot(example) for example in task.drawn(options.shots, options.seed)]


def answer_length(task: Task, options: Options) -> int:
    """The most tokens of a generated answer."""
    return options.max_new_tokens or task.max_new_tokens


def _asked(task: Task, vocabulary: Vocabulary, options: Options) -> Iterator[Asked]:
    """What the model is asked for each example, as far as it fits into the context."""
    if task.answered == "reading":
        for number in range(len(task.examples)):
            yield from _windows(task, vocabulary, options, number)
        return
    shots = shot_texts(task, options)
    for number in range(len(task.examples)):
        count = len(shots)
        one = _with_shots(task, vocabulary, options, number, shots)
        while options.context and one.length > options.context:
            if not options.drop_shots or not count:
                raise CalmError(_too_long(task, one, options))
            count -= 1
            one = _with_shots(task, vocabulary, options, number, shots[:count])
        yield one


def _too_long(task: Task, one: Asked, options: Options) -> str:
    advice = "--drop_shots leaves out shots that do not fit" if one.shots else "it has no shots"
    return (
        f"{task.name}, example {one.example + 1}: the prompt has {len(one.prompt)} tokens with its "
        f"{one.shots} shots and the answer may have {one.room}, more than "
        f"--context={options.context}; {advice}"
    )


def _with_shots(
    task: Task, vocabulary: Vocabulary, options: Options, number: int, shots: Sequence[str]
) -> Asked:
    example = task.examples[number]
    text = "".join(shots) + task.template.ask(example)
    prompt = vocabulary.encode_sequence(text)
    if task.answered == "generation":
        return Asked(number, prompt, [], answer_length(task, options), len(shots), text)
    choices = [task.template.answer.format(targets=choice) for choice in example["choices"]]
    whole = [vocabulary.encode_sequence(text + choice) for choice in choices]
    # A token may hold the end of the prompt with the beginning of a choice. All choices are scored
    # from the same place on, or they would not be probabilities of the same text's ends.
    borders = [in_common(prompt, ids) for ids in whole]
    border = min(borders)
    continuations = [ids[border:] for ids in whole]
    for choice, ids, own in zip(example["choices"], continuations, borders, strict=True):
        if not own:
            raise CalmError(f"{task.name}: the choice {choice!r} changes the prompt's first token")
        if not ids:
            raise CalmError(f"{task.name}: the choice {choice!r} has no tokens of its own")
    return Asked(number, prompt[:border], continuations, max(map(len, continuations)), len(shots))


def _handed_over(
    model: Any,
    augment: Any,
    task: Task,
    asked: list[Asked],
    variant: Variant,
    options: Options,
    batch_size: int,
) -> list[Asked]:
    if task.answered != "generation":
        raise CalmError(f"--hand_over: {task.name} is not answered by text")
    samplings = [
        Sampling(max_new_tokens=one.room, stop=task.template.stops(example))
        for one, example in zip(asked, task.examples, strict=True)
    ]
    slots = rows(min(batch_size, len(asked)), max(one.length for one in asked))
    found = variant.rule.prompts(augment, [one.text for one in asked], samplings, slots)
    rewritten = [
        dataclasses.replace(one, prompt=model.vocabulary.encode_sequence(prompt), handed=said)
        for one, (said, prompt) in zip(asked, found, strict=True)
    ]
    for one in rewritten:
        if options.context and one.length > options.context:
            raise CalmError(_too_long(task, one, options))
    return rewritten


def _windows(task: Task, vocabulary: Vocabulary, options: Options, number: int) -> Iterator[Asked]:
    """A text in pieces of one size, each behind the token before it; the last behind more.

    Before the first token stands what starts every text, or else what ends one.
    """
    ids, size = vocabulary.encode(task.examples[number]["text"]), options.context or READ_AT_ONCE
    start = [*vocabulary.start_ids[-1:]] or [*vocabulary.eos_ids[:1]]
    if not start:
        raise CalmError(f"{vocabulary} has neither a start nor an end token to read a text behind")
    for first in range(0, len(ids), size):
        piece = ids[first : first + size]
        before = ids[max(0, first + len(piece) - size - 1) : first] if first else start
        yield Asked(number, before, [piece], len(piece), 0)


def _records(
    generator: Generator | Recomputed,
    task: Task,
    asked: list[Asked],
    model: str,
    options: Options,
) -> Records:
    shown = f"{model} {task.name}".strip()
    if task.answered == "generation":
        records = _generated(generator, task, asked, shown, options)
    elif task.answered == "choices":
        records = _chosen(generator, task, asked, shown)
    else:
        records = _read(generator, task, asked, shown)
    if task.judge is not None:
        task.judge(records)
    main = metric_table.find(task.metrics[0])
    if main.judge is not None:
        for record in records:
            record["correct"] = main.judge(record)
    hidden = {field for _, field, _, _ in string.Formatter().parse(task.template.question)}
    return [{k: v for k, v in one.items() if k == "inputs" or k not in hidden} for one in records]


def _generated(
    generator: Generator | Recomputed,
    task: Task,
    asked: list[Asked],
    shown: str,
    options: Options,
) -> Records:
    records: Records = [{}] * len(asked)
    several = options.samples if "pass@1" in task.metrics else 1
    samplings = [
        Sampling(
            max_new_tokens=answer_length(task, options),
            temperature=options.temperature,
            top_p=options.top_p,
            stop=task.template.stops(example),
            n=several,
            seed=options.seed,
        )
        for example in task.examples
    ]
    prompts = [one.prompt for one in asked]
    with tqdm(total=len(asked), desc=shown, unit="example") as progress:
        for index, completions in generator.as_completed(prompts, samplings):
            if error := next(filter(None, (answer.error for answer in completions)), None):
                raise CalmError(f"{shown}: example {index}, {error}")
            said = [one.text for one in completions]
            kept = _kept(task, task.examples[index], asked[index])
            records[index] = {**kept, "prediction": said[0]}
            if several > 1:
                records[index]["samples"] = said
            progress.update()
    return records


def _chosen(generator: Generator, task: Task, asked: list[Asked], shown: str) -> Records:
    pairs = [(one.prompt, ids) for one in asked for ids in one.continuations]
    scores = iter(_scores(generator, pairs, shown))
    records = []
    for example, one in zip(task.examples, asked, strict=True):
        logprobs = [next(scores) for _ in one.continuations]
        best = max(range(len(logprobs)), key=logprobs.__getitem__)
        record = {**_kept(task, example, one), "logprobs": logprobs}
        records.append({**record, "prediction": example["choices"][best]})
    return records


def _read(generator: Generator, task: Task, asked: list[Asked], shown: str) -> Records:
    records = [
        {"start": text[:80], "bytes": len(text.encode()), "tokens": 0, "logprob": 0}
        for text in (example["text"] for example in task.examples)
    ]
    pairs = [(one.prompt, one.continuations[0]) for one in asked]
    for one, logprob in zip(asked, _scores(generator, pairs, shown), strict=True):
        records[one.example]["tokens"] += one.room
        records[one.example]["logprob"] += logprob
    return records


def _scores(generator: Generator, pairs: list[tuple[list[int], list[int]]], shown: str):
    with tqdm(total=len(pairs), desc=shown, unit="text") as progress:
        # Of nearly one size, since a single pair cannot be shuffled.
        for block in np.array_split(np.arange(len(pairs)), -(-len(pairs) // _BLOCK) or 1):
            before, after = ([pairs[number][side] for number in block] for side in (0, 1))
            for score in generator.score(before, after):
                progress.update()
                yield score.logprob


def _kept(task: Task, example: dict[str, Any], one: Asked) -> dict[str, Any]:
    shots = {"shots": one.shots} if task.pool else {}
    handed = {} if one.handed is None else {"handed_over": one.handed}
    return {"inputs": task.template.ask(example), **example, **shots, **handed}
