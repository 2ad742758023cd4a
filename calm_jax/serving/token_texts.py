"""Tokens as text, for lists of log-probabilities."""

import functools
import re
from typing import Any

from calm_jax.decoding.text_stream import HALF

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # the name of a byte's token in tokenizers


@functools.cache
def _byte_level_characters() -> dict[str, int]:
    """The byte that each character means in names of GPT-2's byte-level BPE."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    named = {chr(256 + place): byte for place, byte in enumerate(others)}
    return {chr(byte): byte for byte in shown} | named


class TokenTexts:
    """The text of each id of a vocabulary in the middle of a text.

    A token that is only part of a character is written "bytes:\\xc3"; a special token is written by
    its name, such as "</s>".
    """

    def __init__(self, vocabulary: Any):
        self._vocabulary = vocabulary
        self._before = vocabulary.encode("a")

    @functools.cached_property
    def _names(self) -> list[str]:
        return self._vocabulary.tokens()

    @functools.lru_cache(maxsize=65536)  # noqa: B019 (it lives as long as the server)
    def text(self, token: int) -> str:
        """Text of a token; two tokens may have the same text, such as "A" and the byte 0x41."""
        text = self._vocabulary.decode_after(self._before, [token])
        if text and HALF not in text:
            return text
        raw = self._raw(token)
        return self.name(token) if raw is None else "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

    def name(self, token: int) -> str:
        """The token's unique name in the vocabulary."""
        return (self._names[token] if token < len(self._names) else "") or f"token:{token}"

    def raw(self, token: int) -> list[int] | None:
        """UTF-8 bytes of the text; None for a special token."""
        text = self._vocabulary.decode_after(self._before, [token])
        if text and HALF not in text:
            return list(text.encode())
        return self._raw(token)

    def _raw(self, token: int) -> list[int] | None:
        name = self.name(token)
        if match := _BYTE.fullmatch(name):
            return [int(match[1], 16)]
        characters = _byte_level_characters()
        is_half = HALF in self._vocabulary.decode_after(self._before, [token])
        if is_half and all(letter in characters for letter in name):
            return [characters[letter] for letter in name]
        return None

    def unambiguous(self, tokens: list[int]) -> list[str]:
        """Texts of different ids, all different: tokens with the same text get their names."""
        texts = [self.text(token) for token in tokens]
        names = [
            text if texts.count(text) == 1 else self.name(token)
            for text, token in zip(texts, tokens, strict=True)
        ]
        # A name may also be another token's text.
        return [
            name if names.count(name) == 1 else f"token:{token}"
            for name, token in zip(names, tokens, strict=True)
        ]
