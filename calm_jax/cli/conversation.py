"""A conversation with a model in the terminal."""

import sys
from typing import Any

from calm_jax.errors import CalmError

END = "/exit"


def converse(generator: Any, sampling: Any, *, chat: bool, system: str | None) -> None:
    """Streams an answer to each line of standard input, until its end or `END`.

    With `chat` all messages are kept, and the vocabulary's template formats them; without it the
    model continues each line alone. A refused line is dropped, and the reason is printed.
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
