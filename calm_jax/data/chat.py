"""Chats as examples: one for each turn of the assistant, with the ids that generation continues."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError

Message = Mapping[str, Any]


def turns(
    vocabulary: Vocabulary, messages: Sequence[Message], arguments: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of each turn of the assistant, in the vocabulary's chat template.

    `arguments` are further inputs of the template, as for `Vocabulary.chat`.

    The prompt is the chat before the turn, with the header that the template puts before an answer:
    generation starts from it. The answer is the template's text for the turn, with its end of turn;
    both together are exactly the template's text of the chat up to that point.

    Raises:
        CalmError: the template refuses the messages, or writes the turn differently from what
            follows that header, so that answers could not be trained as they are generated.
    """
    arguments = arguments or {}
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise CalmError('"messages" begins with the assistant, so that turn has no prompt')
        prompt = vocabulary.chat(messages[:number], **arguments)
        whole = vocabulary.chat(messages[: number + 1], add_generation_prompt=False, **arguments)
        answer = whole.removeprefix(prompt)
        if answer == whole or not answer:
            raise CalmError(
                f"the chat template does not write message {number} after its own prompt: the "
                f"prompt ends in {prompt[-40:]!r}, the chat with the message in {whole[-40:]!r}"
            )
        yield prompt, answer


def encode_examples(
    vocabulary: Vocabulary,
    prompts: Sequence[str],
    answers: Sequence[str],
    is_turn: Sequence[bool],
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of prompts, and of answers with their end; `is_turn` marks pairs that `turns` made.

    Other pairs are tokenised separately, and the end token is added to the answer.

    If the ids of a turn's prompt and answer together begin with the prompt's own ids, the rest is
    the answer: the model learns to continue exactly the ids that generation gives it. If a token
    would cover the end of the prompt and the start of the answer, the answer is tokenised alone.

    The ids that start every sequence are left out, even if the text contains them, as a chat's text
    does. If the template ends an answer with one of `vocabulary.eos_ids`, it stays as published: it
    ends at a token where generation stops, followed by what the template writes after it (often a
    line break). The end token is added to any other answer, or the model would never learn to stop.
    """
    prompt_ids, answer_ids = vocabulary.encode_batch(prompts), vocabulary.encode_batch(answers)
    turns = [row for row, turn in enumerate(is_turn) if turn]
    wholes = vocabulary.encode_batch([prompts[row] + answers[row] for row in turns])
    for row, whole in zip(turns, wholes, strict=True):
        prompt = prompt_ids[row]
        if whole[: len(prompt)] == prompt:
            answer_ids[row] = whole[len(prompt) :]
    for row, (ids, turn) in enumerate(zip(answer_ids, is_turn, strict=True)):
        if not (turn and _is_closed(vocabulary, ids)):
            ids.append(vocabulary.eos_id)
        first = prompt_ids if prompts[row] else answer_ids
        first[row] = vocabulary.without_start(first[row])
    return prompt_ids, answer_ids


def _is_closed(vocabulary: Vocabulary, ids: list[int]) -> bool:
    """Whether there is an end token, and only white space after the last one."""
    ends = [index for index, token in enumerate(ids) if token in vocabulary.eos_ids]
    return bool(ends) and not vocabulary.decode(ids[ends[-1] + 1 :]).strip()
