"""Tokens as text, for lists of log-probabilities."""

import functools
import re
from typing import Any

from calm_jax.data.token_texts import bytes_of_characters
from calm_jax.decoding.text_stream import HALF

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # the name of a byte's token in tokenizers


class TokenTexts:
    """The text of each id of a vocabulary in the middle of a text.

    A token that is only part of a character is written "bytes:\\xc3"; a special token is written by
    its name, such as "</s>".
    """

    def __init__(self, vocabulary: Any):
        self._vocabulary = vocabulary
        self._before = vocabulary.encode("a")
        self._bytes_of = bytes_of_characters()

    @functools.cached_property
    def _names(self) -> list[str]:
        return self._vocabulary.tokens()

    def text(self, token: int) -> str:
        """Text of a token; two tokens may have the same text, such as "A" and the byte 0x41."""
        return self._text_and_bytes(token)[0]

    def raw(self, token: int) -> list[int] | None:
        """UTF-8 bytes of the text; None for a special token."""
        return self._text_and_bytes(token)[1]

    def name(self, token: int) -> str:
        """The token's unique name in the vocabulary."""
        return (self._names[token] if token < len(self._names) else "") or f"token:{token}"

    @functools.lru_cache(maxsize=65536)  # noqa: B019 (it lives as long as the server)
    def _text_and_bytes(self, token: int) -> tuple[str, list[int] | None]:
        text = self._vocabulary.decode_after(self._before, [token])
        is_half = HALF in text
        if text and not is_half:
            return text, list(text.encode())
        name = self.name(token)
        if match := _BYTE.fullmatch(name):
            raw = [int(match[1], 16)]
        elif is_half and self._bytes_of.keys() >= set(name):
            raw = [self._bytes_of[letter] for letter in name]
        else:
            return name, None
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw

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
