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

    The ids that start every sequence are not among them, also where the text brings them itself, as
    that of a chat does. An answer that the template closes with one of `vocabulary.eos_ids` ends
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
    for row, (ids, turn) in enumerate(zip(answer_ids, is_turn, strict=True)):
        if not (turn and _is_closed(vocabulary, ids)):
            ids.append(vocabulary.eos_id)
        first = prompt_ids if prompts[row] else answer_ids
        first[row] = vocabulary.without_start(first[row])
    return prompt_ids, answer_ids


def _is_closed(vocabulary: Vocabulary, ids: list[int]) -> bool:
    """Whether the last end token, if there is one, has nothing but white space behind it."""
    ends = [index for index, token in enumerate(ids) if token in vocabulary.eos_ids]
    return bool(ends) and not vocabulary.decode(ids[ends[-1] + 1 :]).strip()
