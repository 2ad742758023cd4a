"""`calm generate`: answers prompts, or holds a conversation."""

import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from calm_jax.cli import config, members, models
from calm_jax.errors import CalmError
from calm_jax.quiet import quiet_libtpu
from calm_jax.text_files import read_lines

USAGE = """Prints what a model answers to each prompt, or talks with it.

  calm generate --workdir=runs/kv/composed --prompt='<math>ab+cd='
  calm generate --workdir=runs/kv/anchor/frozen --prompts_file=prompts.txt --max_new_tokens=8
  calm generate --workdir=models/gemma --chat --prompt='Who wrote Faust?' --temperature=0.8 --n=3
  calm generate --workdir=models/gemma --prompts_file=prompts.txt --output=answers.jsonl
  calm generate --workdir=models/gemma

WORKDIR is a run of `calm train`, a frozen folder or an exported bridge. If the frozen models of a
bridge have moved since it was trained, --anchor and --augments say where they are. Without
--temperature the most probable token is taken at every step. With --chat each prompt is a user's
message, formatted by the model's chat template. The model runs on the first device;
--mesh.tensor=8 and the like spread it over all. --draft=4 lets the augment of a pair draft tokens,
which changes no answer and saves time if the two often agree.

--output writes each answer as soon as it is complete, as one JSON line: index, prompt, answer and
finish_reason; with --n above 1, answers and finish_reasons. Once all are there, the lines are
sorted. After a stop the same command continues the file; FILE.flags.json beside it says what was
asked. Several processes can share the work: start the same command on each machine, and if they do
not find each other, add --coordinator, --process_count and --process_index.

Without a prompt, each line of standard input is answered, until its end or /exit. A model with a
chat template remembers the conversation (not with --nochat); any other continues each line."""

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "n", "seed")
SIZES = ("max_length", "slots", "cache_dtype", "prefill_chunk", "draft")
# What answers depend on, besides the model and the prompts.
ASKED = ("step", "chat", "system", "max_new_tokens", *SAMPLING, "cache_dtype")
NEW_TOKENS, NEW_TOKENS_OF_A_TURN = 32, 512


def _define_flags(define: config.Define) -> None:
    define("string", "workdir", "folder that holds a model")
    models.define_flags(define)
    members.define_flags(define)
    define("multi_string", "prompt", "text to continue; repeatable", [])
    define("string", "prompts_file", "file with one prompt on each line")
    define("string", "output", "file of JSON lines that the answers are added to")
    define("bool", "chat", "prompts are messages of a user")
    define("string", "system", "system message before each prompt; needs --chat")
    new = f"default: {NEW_TOKENS}, in a conversation {NEW_TOKENS_OF_A_TURN}"
    define("integer", "max_new_tokens", f"longest answer, in tokens; {new}")
    define("float", "temperature", "divides the logits; 0: the most probable token is taken")
    define("integer", "top_k", "only the k most probable tokens")
    define("float", "top_p", "only the most probable tokens, up to this total probability")
    define("float", "min_p", "only tokens at least this fraction as probable as the best one")
    define("float", "repetition_penalty", "above 1: makes tokens already present less probable")
    define("multi_string", "stop", "text before which an answer ends; repeatable")
    define("integer", "n", "answers to each prompt")
    define("integer", "seed", "seed of all random numbers")
    define("integer", "slots", "answers generated at once")
    longest = "most tokens of a prompt and its answer; default: what the prompts need"
    define("integer", "max_length", longest)
    define("enum", "cache_dtype", models.CACHE_DTYPE, enum_values=models.CACHE_DTYPES)
    define("integer", "prefill_chunk", "most tokens of prompts that are read at once")
    define("integer", "draft", models.DRAFT)


def main(argv: list[str]) -> int:
    values, mesh = models.parse(argv, USAGE, _define_flags)
    prompts = list(values.prompt)
    if values.prompts_file is not None:
        prompts += read_lines(values.prompts_file)
    talks = not values.prompt and values.prompts_file is None
    _check(values, prompts, talks)

    quiet_libtpu()
    with members.joined(values):
        if talks:
            _talk(values, mesh)
        else:
            _answer(values, mesh, prompts)
    return 0


def _talk(values: flags.FlagValues, mesh: dict[str, int] | None) -> None:
    """A conversation in the terminal."""
    import jax

    from calm_jax.cli.conversation import converse
    from calm_jax.decoding import Generator

    if (count := jax.process_count()) > 1:
        raise CalmError(f"a conversation needs one process, not {count}: give --prompt")
    sampling = _sampling(values, NEW_TOKENS_OF_A_TURN)
    model = models.load(values, mesh)
    if model.vocabulary is None:
        raise CalmError(f"the model of {values.workdir} has no vocabulary to talk with")
    chat = values.chat
    if chat is None:
        chat = values.system is not None or model.vocabulary.chat_template is not None
    if chat:
        _check_template(model, values.workdir)
    generator = Generator(model, **_given(values, SIZES), slots=1)
    converse(generator, sampling, chat=chat, system=values.system)


def _answer(values: flags.FlagValues, mesh: dict[str, int] | None, prompts: list[str]) -> None:
    """Answers all prompts; if several processes share the work, only the first one prints."""
    import jax

    from calm_jax import processes
    from calm_jax.checkpoints.files import absolute
    from calm_jax.cli.answer_file import AnswerFile

    sampling = _sampling(values, NEW_TOKENS)
    output = None
    if values.output and processes.is_first():
        asked = {"workdir": str(absolute(values.workdir)), **_given(values, ASKED)}
        output = AnswerFile(values.output, prompts, sampling.n, asked)
    done = set(processes.gather(sorted(output.done) if output else [])[0])
    if values.output and len(done) == len(prompts):
        processes.say(f"{values.output} has all {len(done)} answers")
        return
    model = models.load(values, (mesh or models.MESH) if jax.process_count() > 1 else mesh)
    texts = _chats(model, prompts, values.system, values.workdir) if values.chat else prompts
    answers = _answers(model, texts, done, sampling, _given(values, SIZES))
    if output is not None:
        output.fill(answers)
        return
    failed = []
    for index, of_prompt in _in_order(answers):
        prompt = prompts[index]
        for answer in of_prompt if not values.output else ():
            if answer.error:
                failed.append(f"prompt {index}, {prompt[:40]!r}: {answer.error}")
                continue
            chat = f"user: {prompt}\nassistant: {answer.text.lstrip(' ')}"
            processes.say(chat if values.chat else prompt + answer.text)
            if not answer.text and processes.is_first():
                print(f"the answer to {prompt!r} is empty", file=sys.stderr)
    if failed:
        raise CalmError(f"{len(failed)} answers failed; {failed[0]}")


def _in_order(answers: Iterator[tuple[int, list[Any]]]) -> Iterator[tuple[int, list[Any]]]:
    """Answers by index from 0, each as soon as those before it have come."""
    come, after = {}, 0
    for index, of_prompt in answers:
        come[index] = of_prompt
        while after in come:
            yield after, come.pop(after)
            after += 1


def _sampling(values: flags.FlagValues, new: int) -> Any:
    from calm_jax.decoding import Sampling

    return Sampling(**{"max_new_tokens": new} | _given(values, ("max_new_tokens", *SAMPLING)))


def _check(values: flags.FlagValues, prompts: list[str], talks: bool) -> None:
    if not prompts and not talks:
        raise CalmError(f"{values.prompts_file}: the file has no prompts")
    if values.system is not None and not (values.chat or (talks and values.chat is None)):
        raise CalmError("--system has no effect without a chat: give --chat too")
    for name in ("output", "slots", "n") if talks else ():
        if values[name].value is not None:
            raise CalmError(
                f"--{name}={values[name].value} is for prompts: give --prompt or --prompts_file"
            )


def _given(values: flags.FlagValues, names: tuple[str, ...]) -> dict[str, Any]:
    """The flags that were given, by name."""
    return {name: values[name].value for name in names if values[name].value is not None}


def _answers(
    model: Any, texts: list[str], done: set[int], sampling: Any, sizes: dict[str, Any]
) -> Iterator[tuple[int, list[Any]]]:
    """The index and the `Completion`s of each text that is not `done`; all are checked first."""
    from calm_jax.decoding import Generator
    from calm_jax.decoding.generator import MOST_ROWS, encode_all, errors_of_prompt
    from calm_jax.decoding.requests import Request

    prompts = encode_all(model.vocabulary, texts)
    needed = {
        "max_length": max(map(len, prompts)) + sampling.max_new_tokens,
        "slots": min((len(prompts) - len(done)) * sampling.n, MOST_ROWS),
    }
    generator = Generator(model, **needed | sizes)
    for index, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        request = Request(prompt, sampling, lambda news: None)
        with errors_of_prompt(f"{index}, {text[:40]!r}"):
            generator.scheduler.check(request)
    rest = [index for index in range(len(prompts)) if index not in done]
    answers = generator.as_completed([prompts[index] for index in rest], sampling)
    return ((rest[number], of_prompt) for number, of_prompt in answers)


def _check_template(model: Any, workdir: str) -> None:
    if model.vocabulary is None or model.vocabulary.chat_template is None:
        raise CalmError(f"--chat: the vocabulary of {workdir} has no chat template")


def _chats(model: Any, prompts: list[str], system: str | None, workdir: str) -> list[str]:
    _check_template(model, workdir)
    before = [] if system is None else [{"role": "system", "content": system}]
    return [model.vocabulary.chat([*before, {"role": "user", "content": text}]) for text in prompts]
