"""What every vocabulary offers, and the vocabulary of raw bytes. No TensorFlow.

A vocabulary turns text into ids and ids into text. It is stored in full with a frozen model, a
published one with all its files, so that the model does not depend on the vocabulary's source.
"""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from etils import epath

from calm_jax.data import chat_template
from calm_jax.data.tokenizer_files import NOTHING, TokenizerFiles
from calm_jax.errors import CalmError

INDEX_FILE = "vocabulary.json"
UNKNOWN_TEXT = "\N{REPLACEMENT CHARACTER}"


class Vocabulary:
    """A map between text and ids.

    Attributes:
      bos_id: the id of the token that is named the start token, or None.
      start_ids: the ids that the tokenizer itself puts before every text; often none, even if a
        start token is named.
      eos_id: the id that training puts at the end of an answer, or None.
      eos_ids: every id that ends an answer, `eos_id` first; chat models have several.
      size: number of ids; every id is in [0, size). Any id, even 0, may be ordinary text.
      rows: number of rows of the smallest embedding that data is made for; None: unknown.
      by_character: whether the ids of a character never depend on the characters beside it.
    """

    kind: str
    file_name: str | None = None
    bos_id: int | None
    start_ids: tuple[int, ...] = ()
    eos_id: int | None
    other_eos_ids: tuple[int, ...] = ()
    size: int
    rows: int | None = None
    by_character = False
    published: TokenizerFiles = NOTHING

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without start or end tokens.

        With a published vocabulary, special tokens written in the text, "</s>", become their ids.
        """
        return self.encode_batch([text])[0]

    def encode_sequence(self, text: str) -> list[int]:
        """`start_ids`, then the ids of `text`, which may already begin with them, as chats do."""
        return [*self.start_ids, *self.without_start(self.encode(text))]

    def without_start(self, ids: list[int]) -> list[int]:
        """`ids` without `start_ids`, if they begin with those."""
        count = len(self.start_ids)
        return ids[count:] if tuple(ids[:count]) == self.start_ids else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without start or end tokens."""
        raise NotImplementedError

    def encode_inside(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode_batch`, for texts that other text precedes: no space is put before them."""
        return self.encode_batch(texts)

    def lost_character(self, text: str) -> str | None:
        """The first character of `text` that the ids of `encode_inside` lose; None if none is."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first end token, without start and other special tokens."""
        return self._decode_visible(self._until_end(ids))

    def decode_after(self, prompt_ids: Iterable[int], ids: Iterable[int]) -> str:
        """Text that `ids` add after `prompt_ids`, up to the first end token among `ids`.

        A token may be written differently at the beginning of a text, such as without its space.
        So both are decoded together, and the prompt's text is cut off.
        """
        prompt = list(map(int, prompt_ids))
        before = self._decode_visible(prompt)
        whole = self._decode_visible([*prompt, *self._until_end(ids)])
        # Bytes that complete the prompt's last character change its last "�".
        same = (a == b for a, b in zip(before, whole, strict=False))
        return whole[sum(itertools.takewhile(bool, same)) :]

    def _until_end(self, ids: Iterable[int]) -> list[int]:
        return list(itertools.takewhile(lambda token: token not in self.eos_ids, map(int, ids)))

    def _decode_visible(self, ids: list[int]) -> str:
        return self._decode([token for token in ids if token != self.bos_id])

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def tokens(self) -> list[str]:
        """The name of every id, in id order; "" for an id without one."""
        raise NotImplementedError

    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes that every id stands for inside a text, in id order.

        They may be a part of a character. Special tokens stand for nothing, the token of unknown
        text for the replacement character.

        Raises:
            CalmError: an id's text depends on the ids beside it.
        """
        raise NotImplementedError

    @property
    def unknown_id(self) -> int | None:
        """The id of text that has no token; None if there is no such text."""
        return None

    @property
    def space_before_text(self) -> bool:
        """Whether the ids of a text begin with a space that `decode` omits."""
        return False

    @property
    def whole_texts(self) -> tuple[str, ...]:
        """Texts of several characters that become one token wherever they stand."""
        return ()

    def token_id(self, token: str) -> int | None:
        """The id with this name; None if there is none."""
        return self.tokens().index(token) if token in self.tokens() else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the token map: equal exactly if every id means the same."""
        return hashlib.sha256(json.dumps(self.tokens()).encode()).hexdigest()

    @functools.cached_property
    def tokenization_fingerprint(self) -> str:
        """SHA-256 of all that determines the ids of a text or a chat; every file counts."""
        digest = hashlib.sha256(json.dumps([self.fingerprint, self._index()]).encode())
        for name, data in self._files().items():
            digest.update(f"{name} {len(data)} ".encode() + data)
        return digest.hexdigest()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return () if self.eos_id is None else (self.eos_id, *self.other_eos_ids)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the published chat template; None if there is none."""
        return self.published.chat_template

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        **arguments: Any,
    ) -> str:
        """The text of a chat in the model's own form, as transformers writes it.

        The text includes special tokens, often the start token too; pass it to `encode_sequence`.

        Args:
            messages: `{"role": "user", "content": "…"}` and so on; more fields if the template
                reads more.
            add_generation_prompt: whether the header of the assistant's answer follows.
            **arguments: further inputs of the template, such as `tools`.

        Raises:
            CalmError: there is no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise CalmError(f"{self} has no chat template")
        return chat_template.render(
            self.chat_template,
            messages,
            self.published.special_tokens,
            add_generation_prompt=add_generation_prompt,
            where=self.published.template_file,
            arguments=arguments,
        )

    @property
    def base_size(self) -> int:
        """Number of ids for which a model must have rows: `size` without added tokens at the end.

        A tokenizer may name more tokens than its model has: Gemma 3 1B's has one for images.
        """
        return self.size

    def check_rows(self, rows: int, where: str) -> None:
        """Raises `CalmError` if an embedding of so many `rows` lacks one for a token."""
        if self.base_size > rows:
            raise CalmError(
                f"{where}: the vocabulary has {self.base_size} tokens, the embedding {rows} rows"
            )

    def first_difference(self, other: "Vocabulary") -> tuple[int, str | None, str | None] | None:
        """The first id whose meaning in `other` differs, and both meanings; None if equal."""
        if self.fingerprint == other.fingerprint:
            return None
        pairs = itertools.zip_longest(self.tokens(), other.tokens())
        return next((index, *pair) for index, pair in enumerate(pairs) if pair[0] != pair[1])

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the full vocabulary into `folder`, from which `load_vocabulary` reads it."""
        self.save_published(folder)
        (epath.Path(folder) / INDEX_FILE).write_text(json.dumps(self._index(), indent=2) + "\n")

    def save_published(self, folder: str | os.PathLike) -> None:
        """Writes its published files into `folder`, byte for byte, under their usual names.

        Raw bytes have none.
        """
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self._files().items():
            (folder / name).write_bytes(data)

    def _index(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "bos_id": self.bos_id,
            "start_ids": list(self.start_ids),
            "eos_id": self.eos_id,
            "other_eos_ids": list(self.other_eos_ids),
            "size": self.size,
            "files": list(self._files()),
        }

    def _files(self) -> dict[str, bytes]:
        own = {self.file_name: self._file_bytes()} if self.file_name else {}
        return own | dict(self.published.files)

    def _file_bytes(self) -> bytes:
        raise NotImplementedError

    def _take_special_tokens(self, where: str) -> None:
        """Takes special tokens from the files of the token map `where`, if they name any."""
        published = self.published
        published.check_added_tokens(self.token_id, where)
        for role, token in published.special_tokens.items():
            if role in ("bos_token", "eos_token"):
                if self.token_id(token) is None:
                    file = published.source_of(role)
                    raise CalmError(f"{file}: {role} {token!r} is not in {where}")
                setattr(self, role.replace("token", "id"), self.token_id(token))
        if ends := published.end_ids(self.size):
            self.eos_id = self.eos_id if self.eos_id in ends else ends[0]
            others = dict.fromkeys(token for token in ends if token != self.eos_id)
            self.other_eos_ids = tuple(others)
        if published.chat_template is not None:
            chat_template.compile_template(published.chat_template, published.template_file)

    @classmethod
    def from_folder(cls, folder: epath.Path, index: dict[str, Any]) -> Self:
        """Reads what `save` wrote."""
        raise NotImplementedError

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}(size={self.size}, bos_id={self.bos_id}, eos_id={self.eos_id})"


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes, with the ids of `seqio.ByteVocabulary` and ByT5."""

    kind = "bytes"
    specials = ("<pad>", "</s>", "<unk>")
    bos_id = None
    eos_id = 1
    size = len(specials) + 256
    by_character = True

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + len(self.specials) for byte in text.encode()] for text in texts]

    def lost_character(self, text: str) -> str | None:
        return None

    def token_bytes(self) -> list[bytes]:
        return [b""] * len(self.specials) + [bytes([byte]) for byte in range(256)]

    def _decode(self, ids: list[int]) -> str:
        first = len(self.specials)
        return bytes(i - first for i in ids if first <= i < self.size).decode(errors="ignore")

    def tokens(self) -> list[str]:
        return [*self.specials, *(f"<0x{byte:02X}>" for byte in range(256))]

    @classmethod
    def from_folder(cls, folder: epath.Path, index: dict[str, Any]) -> Self:
        return cls()


def check_ids(ids: Sequence[int], rows: int, what: str, vocabulary: Vocabulary | None) -> None:
    """Raises `CalmError` naming the first of `ids` that an embedding of so many rows lacks.

    A lookup would silently return another row. `what` says whose ids they are.
    """
    ids = np.asarray(ids)
    outside = ids[(ids < 0) | (ids >= rows)]
    if outside.size:
        token, name = outside[0], ""
        if vocabulary is not None and 0 <= token < vocabulary.size:
            name = f" ({vocabulary.tokens()[token]!r})"
        raise CalmError(f"{what} token {token}{name} is outside the {rows} rows of the embedding")
