"""A user's own records as examples: a prompt, which may be empty, and what is trained on.

A record is one of

    {"inputs": "…", "targets": "…"}                  trained on the targets
    {"prompt": "…", "completion": "…"}               trained on the completion
    {"text": "…"}                                    trained on all of it
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}

A chat becomes one example for each turn of the assistant, trained on that turn; everything before
it is the prompt. A turn with `"weight": 0` is read but not trained on. If the vocabulary has a chat
template, it writes the texts (`chat.turns`), with the record's `tools` and `chat_template_kwargs`;
else each message is `role: content` and a line break, and the prompt ends with `assistant: `.
Content may be a list of parts, as in OpenAI's API: `[{"type": "text", "text": "…"}]`. `prompt` and
`completion` may be the two parts of a chat, as in TRL: lists of messages; only turns in the
completion are trained on.

Fields that are null count as absent. Fields that do not affect training are ignored.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from calm_jax.data import chat
from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError

# The keys of each form; error messages name a form by its first key.
_FORMS = (("messages",), ("text",), ("inputs", "targets"), ("prompt", "completion"))
_OF_CHATS = ("tools", "chat_template_kwargs")

# Arguments of the template that come from other keys of the record, or from the renderer.
_OWN_ARGUMENTS = {"messages", "tools", "add_generation_prompt"}

# All keys that are read, and those that may be absent.
OPTIONAL = (*_OF_CHATS, "weight")
FIELDS = (*itertools.chain.from_iterable(_FORMS), *OPTIONAL)


def examples(record: Any, vocabulary: Vocabulary | None = None) -> Iterator[dict[str, Any]]:
    """Yields `{"inputs", "targets"}` of every example in a record, in order.

    With a vocabulary that has a chat template, each also has `is_turn`: whether the template wrote
    it, special tokens included. Raises `CalmError` for a record that has none of the forms or
    several, asks for unsupported training, or is refused by the template.
    """
    templated = vocabulary is not None and vocabulary.chat_template is not None
    if not isinstance(record, Mapping):
        raise CalmError(f"not a JSON object but {type(record).__name__}")
    record = _joined({key: value for key, value in record.items() if value is not None})
    form = _form(record)
    is_turn = templated and form[0] == "messages"
    if form[0] == "messages":
        pairs = _turns(record, vocabulary if templated else None)
    elif form[0] == "text":
        pairs = [("", _text(record, "text"))]
    else:
        pairs = [(_text(record, form[0], may_be_empty=True), _text(record, form[1]))]
    for inputs, targets in pairs:
        example = {"inputs": inputs, "targets": targets}
        yield {**example, "is_turn": is_turn} if templated else example


def _joined(record: dict[str, Any]) -> dict[str, Any]:
    """The record with `messages` in place of a prompt and a completion that are messages."""
    parts = [record.get(key) for key in _FORMS[-1]]
    if "messages" in record or not all(isinstance(part, list) for part in parts):
        return record
    read = [{**m, "weight": 0} if _is_assistant(m) else m for m in parts[0]]
    rest = {key: value for key, value in record.items() if key not in _FORMS[-1]}
    return {"messages": read + parts[1], **rest}


def _is_assistant(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _form(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of the form that a record has."""
    found = [form for form in _FORMS if any(key in record for key in form)]
    if not found:
        raise CalmError(
            'lacks "inputs" and "targets", "prompt" and "completion", "text", or "messages"; has '
            + ", ".join(map(str, record))
        )
    if len(found) > 1:
        keys = [next(key for key in form if key in record) for form in found[:2]]
        raise CalmError(
            f'"{keys[0]}" and "{keys[1]}" are both there; choose one with "columns" of the entry'
        )
    if record.get("weight", 1) != 1:
        raise CalmError(
            f'"weight" {record["weight"]!r} of a record: every record weighs 1; the "weight" of '
            "an entry is for its whole file"
        )
    for key in (*_OF_CHATS, "functions"):
        if record.get(key) and (found[0][0] != "messages" or key == "functions"):
            raise CalmError(f'"{key}" together with "{found[0][0]}" is not supported')
    return found[0]


def _turns(record: Mapping[str, Any], vocabulary: Vocabulary | None) -> Iterator[tuple[str, str]]:
    """The prompt and the answer of each turn of the assistant that is trained on."""
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise CalmError('"messages" is not a list of objects')
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    trained = [
        _is_trained(number, message)
        for number, message in enumerate(messages)
        if _text(message, "role") == "assistant"
    ]
    if not any(trained):
        ones = " with a weight" if trained else ""
        raise CalmError(f'"messages" has no turn of the assistant{ones}')
    messages = [_message(number, message, vocabulary) for number, message in enumerate(messages)]
    if vocabulary is not None:
        turns = chat.turns(vocabulary, messages, _template_arguments(record))
    elif key := next((key for key in _OF_CHATS if record.get(key)), None):
        raise CalmError(f'"{key}" needs a chat template, and the vocabulary has none')
    else:
        turns = _plain_turns(messages)
    return itertools.compress(turns, trained)


def _is_trained(number: int, message: Mapping[str, Any]) -> bool:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise CalmError(f'"weight" {weight!r} of message {number} is neither 0 nor 1')
    return bool(weight)


def _message(number: int, message: Mapping[str, Any], templated: Any) -> dict[str, Any]:
    """The message in the form that templates take: its content is one text, without a weight."""
    message = dict(message)
    weight = message.pop("weight", 0)
    if weight and message["role"] != "assistant":
        raise CalmError(
            f'"weight" {weight!r} of message {number}: only turns of the assistant are trained on'
        )
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_part(number, part) for part in message["content"])
    calls = next((key for key in ("tool_calls", "function_call") if message.get(key)), None)
    if calls and templated is None:
        raise CalmError(f'"{calls}" of message {number} needs a chat template')
    if "content" in message or not calls:
        _text(message, "content", may_be_empty=bool(calls))
    return message


def _part(number: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise CalmError(f'"content" of message {number} has a part {kind!r}; only text is read')
    return _text(part, "text", may_be_empty=True)


def _template_arguments(record: Mapping[str, Any]) -> dict[str, Any]:
    tools, arguments = record.get("tools"), record.get("chat_template_kwargs", {})
    if tools is not None and not isinstance(tools, list):
        raise CalmError(f'"tools" is not a list but {type(tools).__name__}')
    if not isinstance(arguments, Mapping):
        raise CalmError(f'"chat_template_kwargs" is not an object but {type(arguments).__name__}')
    if taken := sorted(_OWN_ARGUMENTS & set(arguments)):
        raise CalmError(f'"chat_template_kwargs" cannot set "{taken[0]}"')
    return {**arguments, **({"tools": tools} if tools else {})}


def _plain_turns(messages: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    prompt = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            yield f"{prompt}{role}: ", content
        prompt += f"{role}: {content}\n"


def _text(record: Mapping[str, Any], field: str, *, may_be_empty: bool = False) -> str:
    if field not in record:
        raise CalmError(f'lacks "{field}"')
    if not isinstance(record[field], str):
        raise CalmError(f'"{field}" is not a string but {type(record[field]).__name__}')
    if not record[field] and not may_be_empty:
        raise CalmError(f'"{field}" is empty')
    return record[field]
