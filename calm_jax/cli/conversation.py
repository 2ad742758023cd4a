"""A conversation with a model in the terminal."""

import sys
from typing import Any

from calm_jax.errors import CalmError

END = "/exit"


def converse(generator: Any, sampling: Any, *, chat: bool, system: str | None) -> None:
    """Answers the lines of standard input, piece by piece, until its end or `END`.

    With `chat` the messages are kept, and the vocabulary's template puts them to the model; without
    it each line is gone on from alone. A line that is refused is forgotten, and the reason told.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    while (line := _next_line()) is not None:
        asked = [*messages, {"role": "user", "content": line}]
        try:
            text = generator.vocabulary.chat(asked) if chat else line
            answer = ""
            for piece in generator.stream(text, sampling):
                piece = piece if answer or not chat else piece.lstrip(" ")
                print(piece, end="", flush=True)
                answer += piece
            print()
        except CalmError as error:
            print(f"error: {error}", file=sys.stderr)
        else:
            messages = [*asked, {"role": "assistant", "content": answer}]


def _next_line() -> str | None:
    """The next line that is not blank; None at the end."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        if line.strip() == END:
            return None
        if line.strip():
            return line
