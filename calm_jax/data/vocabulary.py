"""Vocabularies without TensorFlow: raw bytes, SentencePiece models and `tokenizer.json` files.

A vocabulary turns text into ids and back and adds nothing: the start and end tokens are the
pipeline's business. It is stored whole beside a frozen model, so that the model never depends on
the place its vocabulary came from; a published one with all its files, chat template included.
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

from calm_jax.data import built_in
from calm_jax.data.published import (
    NOTHING,
    START_AND_END_NAMES,
    TOKEN_MAPS,
    Published,
    read_file,
)
from calm_jax.errors import CalmError

INDEX_FILE = "vocabulary.json"
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Vocabulary:
    """A map between text and ids.

    Attributes:
      bos_id: the id that starts a sequence, or None.
      eos_id: the id that training puts at the end of a sequence, or None.
      eos_ids: every id that ends an answer, `eos_id` first; chat models have several.
      size: number of ids; every id is in [0, size). Any id, 0 too, may be ordinary text.
      rows: number of rows of the smallest embedding that data is made for; None: not known.
    """

    kind: str
    file_name: str | None = None
    bos_id: int | None
    eos_id: int | None
    other_eos_ids: tuple[int, ...] = ()
    size: int
    rows: int | None = None
    published: Published = NOTHING

    @staticmethod
    def bytes() -> "ByteVocabulary":
        """UTF-8 bytes with ByT5's ids: 0 padding, 1 end, 2 unknown, byte + 3; no start token."""
        return ByteVocabulary()

    @staticmethod
    def sentencepiece(path: str | os.PathLike) -> "Vocabulary":
        """A SentencePiece model file. Raises `CalmError` if it is missing or not such a file."""
        from calm_jax.data.sentencepiece_vocabulary import SentencePieceVocabulary

        return SentencePieceVocabulary.from_published(epath.Path(path))

    @staticmethod
    def tokenizer(path: str | os.PathLike) -> "TokenizerVocabulary":
        """A `tokenizer.json`; its start and end tokens come from `tokenizer_config.json` beside it.

        Without that file they are looked up by the names published tokenizers use.
        Raises `CalmError` if the file is missing or not a tokenizer, or if one beside it is damaged
        or contradicts it.
        """
        return TokenizerVocabulary.from_published(epath.Path(path))

    @staticmethod
    def from_model_folder(folder: str | os.PathLike) -> "Vocabulary | None":
        """The vocabulary of the published model in `folder`; None if it has none there.

        That is tokenizer.json, or else a SentencePiece model: tokenizer.model, or the one file
        "….model" or "….spm"; with what `calm_jax.data.published` names beside it.
        Raises `CalmError` if a file is damaged or contradicts another.
        """
        maps = token_maps(epath.Path(folder))
        usual = [path for name in TOKEN_MAPS for path in maps if path.name == name]
        if not usual and len(maps) > 1:
            names = ", ".join(path.name for path in maps)
            raise CalmError(f"{folder} has several SentencePiece models and no tokenizer: {names}")
        return next(map(Vocabulary.load, usual or maps), None)

    @staticmethod
    def load(spec: str | os.PathLike) -> "Vocabulary":
        """The vocabulary that `spec` names.

        "bytes" · "key_value" or "key_value/CONFIG" (the key-value task's own) · a SentencePiece
        model "….model" or "….spm" · "….json", a tokenizer · a folder made by `save`.
        """
        spec = str(spec)
        if spec == "bytes":
            return Vocabulary.bytes()
        if (vocabulary := built_in.vocabulary(spec)) is not None:
            return vocabulary
        path = epath.Path(spec)
        if (path / INDEX_FILE).exists():
            return _from_folder(path)
        if path.suffix in (".model", ".spm"):
            return Vocabulary.sentencepiece(path)
        if path.suffix == ".json":
            return Vocabulary.tokenizer(path)
        raise CalmError(
            f"vocabulary {spec!r} is not 'bytes', 'key_value', a .model, .spm or .json file, "
            f"or a folder with {INDEX_FILE}"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without start or end tokens.

        Special tokens that stand in the text of a published vocabulary, "</s>", become their ids.
        """
        return self.encode_batch([text])[0]

    def encode_sequence(self, text: str) -> list[int]:
        """Ids of `text` behind the start token, which the text may bring itself, as chats do."""
        ids = self.encode(text)
        return ids if ids[:1] == [self.start_id] else [self.start_id, *ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without start or end tokens."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first end token; start and other special tokens say nothing."""
        kept = itertools.takewhile(lambda token: token not in self.eos_ids, map(int, ids))
        return self._decode([token for token in kept if token != self.bos_id])

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def tokens(self) -> list[str]:
        """The name of every id, in id order; "" for an id without one."""
        raise NotImplementedError

    def token_id(self, token: str) -> int | None:
        """The id that has this name, None if there is none."""
        return self.tokens().index(token) if token in self.tokens() else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the token map: equal exactly if every id means the same."""
        return hashlib.sha256(json.dumps(self.tokens()).encode()).hexdigest()

    @functools.cached_property
    def tokenization_fingerprint(self) -> str:
        """SHA-256 of all that decides the ids of a text or a chat: changes with every file."""
        digest = hashlib.sha256(json.dumps([self.fingerprint, self._index()]).encode())
        for name, data in self._files().items():
            digest.update(f"{name} {len(data)} ".encode() + data)
        return digest.hexdigest()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return () if self.eos_id is None else (self.eos_id, *self.other_eos_ids)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the published chat template, None if there is none."""
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

        It carries its special tokens, often the start token too: `encode_sequence` takes it.

        Args:
            messages: `{"role": "user", "content": "…"}` and so on; more fields if the template
                reads more.
            add_generation_prompt: whether the head of the assistant's answer follows.
            **arguments: what else the template reads, such as `tools`.

        Raises:
            CalmError: there is no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise CalmError(f"{self} has no chat template")
        from calm_jax.data import chat

        return chat.render(
            self.chat_template,
            messages,
            self.published.special_tokens,
            add_generation_prompt=add_generation_prompt,
            where=self.published.template_file,
            arguments=arguments,
        )

    @functools.cached_property
    def seqio(self) -> Any:
        """This vocabulary as a `seqio.Vocabulary` (imports TensorFlow)."""
        from calm_jax.data.seqio_vocabulary import SeqioVocabulary

        return SeqioVocabulary(self)

    @property
    def base_size(self) -> int:
        """Number of ids that a model must have rows for; `size`, but for added tokens at the end.

        A tokenizer may name more than its model knows: Gemma 3 1B's has a token for images.
        """
        return self.size

    def check_rows(self, rows: int, where: str) -> None:
        """Raises `CalmError` when a model with so many embedding rows lacks one for a token."""
        if self.base_size > rows:
            raise CalmError(
                f"{where}: the vocabulary has {self.base_size} tokens, the embedding {rows} rows"
            )

    @property
    def start_id(self) -> int:
        """What every sequence starts with: the start token, else the end token, else 0."""
        return next(token for token in (self.bos_id, self.eos_id, 0) if token is not None)

    def first_difference(self, other: "Vocabulary") -> tuple[int, str | None, str | None] | None:
        """The first id that means another thing in `other`, and both meanings; None if equal."""
        if self.fingerprint == other.fingerprint:
            return None
        pairs = itertools.zip_longest(self.tokens(), other.tokens())
        return next((index, *pair) for index, pair in enumerate(pairs) if pair[0] != pair[1])

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the vocabulary whole into `folder`, from where `load` reads it."""
        self.save_published(folder)
        (epath.Path(folder) / INDEX_FILE).write_text(json.dumps(self._index(), indent=2) + "\n")

    def save_published(self, folder: str | os.PathLike) -> None:
        """Writes the files it was published with into `folder`, byte for byte, under the names
        that other programs look for. Raw bytes have none."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self._files().items():
            (folder / name).write_bytes(data)

    def _index(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "bos_id": self.bos_id,
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

    def _take_published(self, where: str) -> None:
        """Takes special tokens from the files beside the token map `where`, if they name any."""
        published = self.published
        published.check_added_tokens(self.token_id, where)
        for role, token in published.special_tokens.items():
            if role in ("bos_token", "eos_token"):
                if self.token_id(token) is None:
                    file = published.source_of(role)
                    raise CalmError(f"{file}: {role} {token!r} is not in {where}")
                setattr(self, role.replace("token", "id"), self.token_id(token))
        ends = published.end_ids(self.size)
        if self.eos_id is None and ends:
            self.eos_id = ends[0]
        self.other_eos_ids = tuple(token for token in ends if token != self.eos_id)
        if published.chat_template is not None:
            from calm_jax.data import chat

            chat.compile_template(published.chat_template, published.template_file)

    @classmethod
    def from_folder(cls, folder: epath.Path, index: dict[str, Any], published: Published) -> Self:
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

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + len(self.specials) for byte in text.encode()] for text in texts]

    def _decode(self, ids: list[int]) -> str:
        first = len(self.specials)
        return bytes(i - first for i in ids if first <= i < self.size).decode(errors="ignore")

    def tokens(self) -> list[str]:
        return [*self.specials, *(f"<0x{byte:02X}>" for byte in range(256))]

    @classmethod
    def from_folder(cls, folder: epath.Path, index: dict[str, Any], published: Published) -> Self:
        return cls()


class TokenizerVocabulary(Vocabulary):
    """A tokenizer of the `tokenizers` library, given as the text of its JSON."""

    kind = "tokenizer"
    file_name = "tokenizer.json"

    def __init__(
        self,
        text: str | bytes,
        bos_id: int | None,
        eos_id: int | None,
        path: str = "tokenizer",
        published: Published = NOTHING,
    ):
        import tokenizers

        self._text = text.encode() if isinstance(text, str) else text
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._text.decode())
        except Exception as error:  # the library raises bare Exception
            raise CalmError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.published = published
        self._add_published_tokens()
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id, self.eos_id = bos_id, eos_id

    def _add_published_tokens(self) -> None:
        """Tokens that only tokenizer_config.json adds, or calls special, as transformers does."""
        import tokenizers

        known = self._tokenizer.get_added_tokens_decoder().values()
        names = {token.content for token in known}
        for _, token in sorted(self.published.added_tokens.items()):
            if token["content"] not in names:
                flags = {key: bool(token[key]) for key in ADDED_TOKEN_FLAGS if key in token}
                self._tokenizer.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
        special = {token.content for token in known if token.special}
        missing = [
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token in self.published.all_special
            if token not in special and self.token_id(token) is not None
        ]
        self._tokenizer.add_special_tokens(missing)

    @classmethod
    def from_published(cls, path: epath.Path) -> Self:
        """Reads `path` and what stands beside it."""
        published = Published.read(path.parent, cls.file_name)
        vocabulary = cls(read_file(path), None, None, str(path), published)
        if not published.names_tokens:
            vocabulary.bos_id, vocabulary.eos_id = map(vocabulary._first_id, START_AND_END_NAMES)
        vocabulary._take_published(path.name)
        return vocabulary

    def _first_id(self, tokens: Iterable[str]) -> int | None:
        ids = map(self.token_id, tokens)
        return next((token for token in ids if token is not None), None)

    @property
    def base_size(self) -> int:
        ids = self._tokenizer.get_vocab(with_added_tokens=False).values()
        return max(ids, default=-1) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def tokens(self) -> list[str]:
        return [self._tokenizer.id_to_token(i) or "" for i in range(self.size)]

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _file_bytes(self) -> bytes:
        return self._text

    @classmethod
    def from_folder(cls, folder: epath.Path, index: dict[str, Any], published: Published) -> Self:
        path = folder / cls.file_name
        return cls(read_file(path), index["bos_id"], index["eos_id"], str(path), published)


def check_ids(ids: Sequence[int], rows: int, what: str, vocabulary: Vocabulary | None) -> None:
    """Raises `CalmError` naming the first of `ids` that an embedding of so many rows lacks.

    A lookup would take another row for it. `what` says whose ids they are.
    """
    ids = np.asarray(ids)
    outside = ids[(ids < 0) | (ids >= rows)]
    if outside.size:
        token, name = outside[0], ""
        if vocabulary is not None and 0 <= token < vocabulary.size:
            name = f" ({vocabulary.tokens()[token]!r})"
        raise CalmError(f"{what} token {token}{name} is outside the {rows} rows of the embedding")


def token_maps(folder: epath.Path) -> list[epath.Path]:
    """The files in a folder that turn text into ids: tokenizer.json and SentencePiece models."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.name == "tokenizer.json" or path.suffix in (".model", ".spm")
    )


def _kinds() -> dict[str, type[Vocabulary]]:
    from calm_jax.data.sentencepiece_vocabulary import SentencePieceVocabulary

    kinds = (ByteVocabulary, SentencePieceVocabulary, TokenizerVocabulary)
    return {kind.kind: kind for kind in kinds}


def _from_folder(folder: epath.Path) -> Vocabulary:
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text())
        kind = _kinds()[index["kind"]]
        # Folders from before there were published files name none.
        for name in index.get("files", [kind.file_name] if kind.file_name else []):
            if not (folder / name).exists():
                raise CalmError(f"{folder} is damaged: {name} is missing")
        published = Published.read(folder, kind.file_name)
        vocabulary = kind.from_folder(folder, index, published)
        vocabulary.other_eos_ids = tuple(index.get("other_eos_ids", ()))
        return vocabulary
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CalmError):
            raise
        raise CalmError(f"{path} is damaged: {type(error).__name__}: {error}") from error
