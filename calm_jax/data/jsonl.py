"""A user's own JSON lines as examples.

Each line of the file is one of

    {"inputs": "…", "targets": "…"}                  trained on the targets
    {"text": "…"}                                    trained on all of it
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}

A chat becomes one example for each turn of the assistant, trained on that turn; all before it is
the prompt. They are written by the chat template of the vocabulary, if it has one (`chat.turns`);
else `role: content` with a line break after each message, and `assistant: ` last.
"""

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from calm_jax.data import chat
from calm_jax.data.rows import CHUNK, Sequences
from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError


def parse(path: str | os.PathLike, vocabulary: Vocabulary | None = None) -> Iterator[dict]:
    """Yields `{"inputs", "targets"}` of every example in the file, in order.

    With a vocabulary that has a chat template each also says `is_turn`: whether the template made
    it, and so wrote its special tokens. Raises `CalmError` "FILE:LINE: …" for a line that is empty,
    is not JSON, or lacks a field, or for a chat that the template refuses.
    """
    if vocabulary is not None and vocabulary.chat_template is None:
        vocabulary = None
    try:
        with epath.Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield from _examples(line, vocabulary)
                except CalmError as error:
                    raise CalmError(f"{path}:{number}: {error}") from error
    except OSError as error:
        raise CalmError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CalmError(f"{path}: {error}") from error


def sequences(path: str | os.PathLike, vocabulary: Vocabulary, limit: int) -> Iterator[Sequences]:
    """The ids of the file's examples, the end token behind each answer; `limit` 0 is all.

    Raises `CalmError` as `parse` does, or for a vocabulary without an end token.
    """
    if vocabulary.eos_id is None:
        raise CalmError(f"{path}: {vocabulary} has no end token for its targets")
    examples = itertools.islice(parse(path, vocabulary), limit or None)
    while chunk := list(itertools.islice(examples, CHUNK)):
        yield Sequences.of(
            *chat.encode_examples(
                vocabulary,
                [example["inputs"] for example in chunk],
                [example["targets"] for example in chunk],
                [example.get("is_turn", False) for example in chunk],
            )
        )


def _examples(line: str, vocabulary: Vocabulary | None) -> Iterator[dict]:
    record = _record(line)
    is_turn = False
    if "messages" in record:
        messages = _messages(record["messages"])
        is_turn = vocabulary is not None
        pairs = chat.turns(vocabulary, messages) if is_turn else _plain_turns(messages)
    elif "text" in record:
        pairs = [("", _text(record, "text"))]
    elif "inputs" in record or "targets" in record:
        pairs = [(_text(record, "inputs", True), _text(record, "targets"))]
    else:
        raise CalmError(
            'lacks "inputs" and "targets", "text", or "messages"; has ' + ", ".join(record)
        )
    for inputs, targets in pairs:
        example = {"inputs": inputs, "targets": targets}
        yield example if vocabulary is None else {**example, "is_turn": is_turn}


def _record(line: str) -> dict[str, Any]:
    if not line.strip():
        raise CalmError("the line is empty")
    try:
        record = json.loads(line.rstrip("\n"))  # behind it columns would count anew
    except json.JSONDecodeError as error:
        raise CalmError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise CalmError(f"not a JSON object but {type(record).__name__}")
    return record


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise CalmError('"messages" is not a list of objects')
    roles = [_text(message, "role") for message in messages]
    for message in messages:
        _text(message, "content")
    if "assistant" not in roles:
        raise CalmError('"messages" has no turn of the assistant')
    return messages


def _plain_turns(messages: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    prompt = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            yield f"{prompt}{role}: ", content
        prompt += f"{role}: {content}\n"


def _text(record: dict[str, Any], field: str, may_be_empty: bool = False) -> str:
    if field not in record:
        raise CalmError(f'lacks "{field}"')
    if not isinstance(record[field], str):
        raise CalmError(f'"{field}" is not a string but {type(record[field]).__name__}')
    if not record[field] and not may_be_empty:
        raise CalmError(f'"{field}" is empty')
    return record[field]
