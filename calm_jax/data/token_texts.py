"""What the parts of a tokenizer.json say about the text of a single token.

The parts are JSON values as the `tokenizers` library writes them.
"""

import re
from collections.abc import Callable
from typing import Any

from calm_jax.errors import CalmError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def reader(decoder: dict[str, Any] | None, whose: str) -> Callable[[str], bytes]:
    """The function from a token's name to the bytes that it stands for inside a text.

    `whose` names the tokenizer in errors. Raises `CalmError` if with this `decoder` a token's text
    depends on the tokens beside it.
    """
    steps = _steps(decoder)
    kinds = [step["type"] for step in steps]
    unknown = set(kinds) - {"ByteLevel", "Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
    if unknown or not kinds:
        raise CalmError(
            f"{whose}: the text of its tokens depends on their neighbours (its decoder is "
            f"{(sorted(unknown) or [None])[0]}), so no other tokenizer can follow it; take an "
            "anchor with a byte-level or SentencePiece tokenizer"
        )
    if "ByteLevel" in kinds:
        bytes_of = bytes_of_characters()
        return lambda token: (
            bytes(map(bytes_of.get, token)) if bytes_of.keys() >= set(token) else token.encode()
        )

    def as_bytes(token: str) -> bytes:
        byte = _BYTE.fullmatch(token)
        if byte and "ByteFallback" in kinds:
            return bytes([int(byte[1], 16)])
        for step in steps:
            if step["type"] == "Replace":
                pattern = step["pattern"].get("String")
                if pattern is None:
                    token = re.sub(step["pattern"]["Regex"], step["content"], token)
                else:
                    token = token.replace(pattern, step["content"])
            elif step["type"] == "Metaspace":
                token = token.replace(step["replacement"], " ")
        return token.encode()

    return as_bytes


def omits_first_space(decoder: dict[str, Any] | None) -> bool:
    """Whether decoding leaves out a space at the beginning of a text."""
    return any(
        (step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)
        or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        for step in _steps(decoder)
    )


def without_space_before(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normaliser or pre-tokenizer that puts no space before a text."""
    if part is None:
        return None
    changed = dict(part)
    if part["type"] == "Sequence":
        key = next(key for key in ("normalizers", "pretokenizers") if key in part)
        changed[key] = [x for x in map(without_space_before, part[key]) if x is not None]
    elif part["type"] == "Prepend":
        return None
    elif part["type"] == "Metaspace":
        changed["prepend_scheme"] = "never"
    elif part.get("add_prefix_space"):
        changed["add_prefix_space"] = False
    return changed


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _steps(part)]


def bytes_of_characters() -> dict[str, int]:
    """The byte that each character stands for in byte-level tokens, as GPT-2 numbers them."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): b for n, b in enumerate(others)}
