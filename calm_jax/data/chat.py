"""Chats: a model's own template around messages, and the turns of an assistant as examples.

A published model was trained on chats in one form, which it publishes as a Jinja template. It is
a stranger's program: it runs in Jinja's sandbox, with what transformers gives such templates.
"""

import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError

Message = Mapping[str, Any]


def render(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool,
    where: str,
    arguments: Mapping[str, Any],
) -> str:
    """The text of a chat, as `apply_chat_template` of transformers makes it.

    Args:
        template: Jinja source.
        messages: `{"role": …, "content": …}` each; fields that are None count as absent.
        special_tokens: names such as "bos_token" with their texts.
        add_generation_prompt: whether the head of an answer of the assistant follows.
        where: what messages call the template.
        arguments: what else the template reads, by name, such as "tools".

    Raises:
        CalmError: no messages; or the template is not Jinja, or refuses them.
    """
    if not messages:
        raise CalmError("a chat without messages")
    messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
    compiled = compile_template(template, where)
    try:
        return compiled.render(
            {
                "tools": None,
                "documents": None,
                **special_tokens,
                **arguments,
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
            }
        )
    except Exception as error:  # the template decides what goes wrong in it
        raise CalmError(f"chat template of {where}: {_line(error)}") from error


@functools.lru_cache
def compile_template(template: str, where: str) -> jinja2.Template:
    """Raises `CalmError` if the source is not Jinja."""
    try:
        return _environment().from_string(template)
    except jinja2.TemplateError as error:
        raise CalmError(f"chat template of {where}: {_line(error)}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant writes; only that shows."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own escapes what HTML would take for markup.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _line(error: Exception) -> str:
    return " ".join(f"{error}".split()) or type(error).__name__


def turns(
    vocabulary: Vocabulary, messages: Sequence[Message], arguments: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of each turn of the assistant, in the vocabulary's chat template.

    `arguments` are what else the template reads, as `Vocabulary.chat` takes it.

    The prompt is the chat before the turn, with the head that the template puts before an answer:
    what generation starts from. The answer is what the template writes for the turn, its end of
    turn included; both together are exactly the template's text of the chat up to there.

    Raises:
        CalmError: the template refuses the messages, or writes the turn in another way than after
            that head, so that no answer could be trained as it is generated.
    """
    arguments = arguments or {}
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise CalmError('"messages" begins with the assistant, whom nothing prompts')
        prompt = vocabulary.chat(messages[:number], **arguments)
        whole = vocabulary.chat(messages[: number + 1], add_generation_prompt=False, **arguments)
        answer = whole.removeprefix(prompt)
        if answer == whole or not answer:
            raise CalmError(
                f"the chat template does not write message {number} as it prompts for it: its "
                f"prompt ends in {prompt[-40:]!r}, the chat with the message in {whole[-40:]!r}"
            )
        yield prompt, answer


def encode_examples(
    vocabulary: Vocabulary,
    prompts: Sequence[str],
    answers: Sequence[str],
    is_turn: Sequence[bool],
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of prompts, and of answers with their end, where `is_turn` of pairs that `turns` made.

    Other pairs are tokenised apart, and the end token is added to the answer.

    Where the text of a turn tokenises to the ids of its prompt and more, "more" is the answer: the
    model learns to go on from the very ids that generation gives it. Where a token would reach over
    the border, the answer is tokenised by itself.

    The start token is every sequence's first input and not one of its ids, so the one that the
    template writes goes. An answer that the template closes with one of `vocabulary.eos_ids` ends
    as the model was published to end: at a token where generation stops, and with what the
    template writes behind it (often a line break). To any other answer the end token is added, or
    the model would never learn to stop.
    """
    prompt_ids, answer_ids = vocabulary.encode_batch(prompts), vocabulary.encode_batch(answers)
    turns = [row for row, turn in enumerate(is_turn) if turn]
    wholes = vocabulary.encode_batch([prompts[row] + answers[row] for row in turns])
    for row, whole in zip(turns, wholes, strict=True):
        prompt = prompt_ids[row]
        if whole[: len(prompt)] == prompt:
            answer_ids[row] = whole[len(prompt) :]
        if prompt[:1] == [vocabulary.start_id]:
            prompt_ids[row] = prompt[1:]
    for ids, turn in zip(answer_ids, is_turn, strict=True):
        if not (turn and _is_closed(vocabulary, ids)):
            ids.append(vocabulary.eos_id)
    return prompt_ids, answer_ids


def _is_closed(vocabulary: Vocabulary, ids: list[int]) -> bool:
    """Whether the last end token, if there is one, has nothing but white space behind it."""
    ends = [index for index, token in enumerate(ids) if token in vocabulary.eos_ids]
    return bool(ends) and not vocabulary.decode(ids[ends[-1] + 1 :]).strip()
