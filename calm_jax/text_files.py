"""Strict readers of text and JSON from outside: every error names its file and line."""

import contextlib
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from calm_jax.errors import CalmError

_MARK = "\ufeff"  # a byte-order mark, which is not part of the text

# Half of a surrogate pair, which JSON can write and UTF-8 cannot.
_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALF = re.compile(f"{_HIGH}(?!{_LOW})|(?<!{_HIGH}){_LOW}")
_LONG_NUMBER = re.compile(r"\d{4301}")  # the shortest that Python refuses to read


def read_lines(path: str | os.PathLike) -> Iterator[str]:
    r"""The lines of a UTF-8 file without their ends, which are \n or \r\n and nothing else.

    A byte-order mark is removed; a file whose name ends in ".gz" is unpacked.
    Raises `CalmError` "FILE:LINE: …" if it is not UTF-8, "FILE: …" if it cannot be read.
    """
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(epath.Path(path).open("rb"))
            if os.fspath(path).endswith(".gz"):
                file = stack.enter_context(gzip.open(file))
            for number, line in enumerate(file, 1):
                yield _decoded(line, path, number).removesuffix("\n").removesuffix("\r")
    except (OSError, EOFError, zlib.error) as error:
        raise CalmError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def parse_json(text: str | bytes, path: str | os.PathLike, line: int = 1) -> Any:
    """The value of a JSON text; `path`, and its first `line` in that file, are for messages.

    Raises `CalmError` "FILE:LINE: …" if it is not JSON, or if it has what JSON allows but UTF-8 or
    Python does not: half a surrogate pair, an integer of thousands of digits, endless nesting.
    """
    if isinstance(text, bytes):
        text = _decoded(text, path, line)

    def refused(problem: str, found: re.Match | None) -> CalmError:
        before = text.count("\n", 0, found.start()) if found else 0
        return CalmError(f"{path}:{line + before}: {problem}")

    try:
        value = json.loads(text)
        if _HALF.search(text):  # it may also be an escaped backslash before "u"
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise CalmError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeEncodeError:
        found = _HALF.search(text)
        raise refused(f"{found[0]} is half of a surrogate pair, not a character", found) from None
    except RecursionError:
        raise refused("too deeply nested", None) from None
    except ValueError:
        raise refused("an integer of over 4,300 digits", _LONG_NUMBER.search(text)) from None


def _decoded(data: bytes, path: str | os.PathLike, line: int) -> str:
    """Text of bytes that begin in this line, without the byte-order mark of the first line."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        byte = data[error.start]
        raise CalmError(f"{path}:{line}: not UTF-8 text: it has the byte 0x{byte:02x}") from None
    return text.removeprefix(_MARK) if line == 1 else text
