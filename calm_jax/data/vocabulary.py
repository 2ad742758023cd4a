"""Vocabularies without TensorFlow: raw bytes, SentencePiece models and `tokenizer.json` files.

A vocabulary turns text into ids and back and adds nothing: the start and end tokens are the
pipeline's business. It is stored whole beside a frozen model, so that the model never depends on
the place its vocabulary came from.
"""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, Self

from etils import epath

from calm_jax.errors import CalmError

INDEX_FILE = "vocabulary.json"

# Names that published tokenizers give the two tokens, for a tokenizer.json that stands alone.
BOS_TOKENS = ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>")
EOS_TOKENS = ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>")


class Vocabulary:
    """A map between text and ids.

    Attributes:
      bos_id: the id that starts a sequence, or None.
      eos_id: the id that ends a sequence, or None.
      size: number of ids; every id is in [0, size). Any id, 0 too, may be ordinary text.
    """

    kind: str
    file_name: str | None = None
    bos_id: int | None
    eos_id: int | None
    size: int

    @staticmethod
    def bytes() -> "ByteVocabulary":
        """UTF-8 bytes with ByT5's ids: 0 padding, 1 end, 2 unknown, byte + 3; no start token."""
        return ByteVocabulary()

    @staticmethod
    def sentencepiece(path: str | os.PathLike) -> "SentencePieceVocabulary":
        """A SentencePiece model file. Raises `CalmError` if it is missing or not such a file."""
        return SentencePieceVocabulary(_read(path), str(path))

    @staticmethod
    def tokenizer(path: str | os.PathLike) -> "TokenizerVocabulary":
        """A `tokenizer.json`; its start and end tokens come from `tokenizer_config.json` beside it.

        Without that file they are looked up by the names published tokenizers use.
        Raises `CalmError` if the file is missing or not a tokenizer.
        """
        return TokenizerVocabulary.from_published(epath.Path(path))

    @staticmethod
    def load(spec: str | os.PathLike) -> "Vocabulary":
        """The vocabulary that `spec` names.

        "bytes" · "key_value" or "key_value/CONFIG" (the key-value task's own) · a SentencePiece
        model "….model" · "….json", a tokenizer · a folder made by `save`.
        """
        spec = str(spec)
        if spec == "bytes":
            return Vocabulary.bytes()
        if spec == "key_value" or spec.startswith("key_value/"):
            from calm_jax.data import key_value

            return key_value.vocabulary(spec.partition("/")[2] or key_value.DEFAULT)
        path = epath.Path(spec)
        if (path / INDEX_FILE).exists():
            return _from_folder(path)
        if path.suffix == ".model":
            return Vocabulary.sentencepiece(path)
        if path.suffix == ".json":
            return Vocabulary.tokenizer(path)
        raise CalmError(
            f"vocabulary {spec!r} is not 'bytes', 'key_value', a .model or .json file, "
            f"or a folder with {INDEX_FILE}"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without start or end tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without start or end tokens."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first end token; start tokens say nothing."""
        kept = []
        for token in ids:
            if token == self.eos_id:
                break
            if token != self.bos_id:
                kept.append(int(token))
        return self._decode(kept)

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def tokens(self) -> list[str]:
        """The name of every id, in id order; "" for an id without one."""
        raise NotImplementedError

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the token map: equal exactly if every id means the same."""
        return hashlib.sha256(json.dumps(self.tokens()).encode()).hexdigest()

    @functools.cached_property
    def seqio(self) -> Any:
        """This vocabulary as a `seqio.Vocabulary` (imports TensorFlow)."""
        from calm_jax.data.seqio_vocabulary import SeqioVocabulary

        return SeqioVocabulary(self)

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
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.file_name:
            (folder / self.file_name).write_bytes(self._file_bytes())
        index = {"kind": self.kind, "bos_id": self.bos_id, "eos_id": self.eos_id, "size": self.size}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def _file_bytes(self) -> bytes:
        raise NotImplementedError

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

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + len(self.specials) for byte in text.encode()] for text in texts]

    def _decode(self, ids: list[int]) -> str:
        first = len(self.specials)
        return bytes(i - first for i in ids if first <= i < self.size).decode(errors="ignore")

    def tokens(self) -> list[str]:
        return [*self.specials, *(f"<0x{byte:02X}>" for byte in range(256))]

    @classmethod
    def from_folder(cls, folder: epath.Path, index: dict[str, Any]) -> Self:
        return cls()


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model. `model` is the file's bytes, `path` names it in errors."""

    kind = "sentencepiece"
    file_name = "sentencepiece.model"

    def __init__(self, model: bytes, path: str):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise CalmError(f"{path} is not a SentencePiece model") from error
        self._model = model
        self.size = self._processor.get_piece_size()
        self.bos_id, self.eos_id = (
            token if token >= 0 else None
            for token in (self._processor.bos_id(), self._processor.eos_id())
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), out_type=int, num_threads=1)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode([i for i in ids if 0 <= i < self.size])

    def tokens(self) -> list[str]:
        return [self._processor.id_to_piece(i) for i in range(self.size)]

    def _file_bytes(self) -> bytes:
        return self._model

    @classmethod
    def from_folder(cls, folder: epath.Path, index: dict[str, Any]) -> Self:
        return cls(_read(folder / cls.file_name), str(folder / cls.file_name))


class TokenizerVocabulary(Vocabulary):
    """A tokenizer of the `tokenizers` library, given as the text of its JSON."""

    kind = "tokenizer"
    file_name = "tokenizer.json"

    def __init__(self, text: str, bos_id: int | None, eos_id: int | None, path: str = "tokenizer"):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise CalmError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.size = max(ids) + 1
        self.bos_id, self.eos_id = bos_id, eos_id

    @classmethod
    def from_published(cls, path: epath.Path) -> Self:
        """Reads `path` and finds its start and end tokens."""
        text = _read(path).decode()
        vocabulary = cls(text, None, None, str(path))
        config_path = path.with_name("tokenizer_config.json")
        if config_path.exists():
            config = json.loads(config_path.read_text())
            bos, eos = ([_content(config.get(key))] for key in ("bos_token", "eos_token"))
        else:
            bos, eos = BOS_TOKENS, EOS_TOKENS
        vocabulary.bos_id, vocabulary.eos_id = vocabulary._first_id(bos), vocabulary._first_id(eos)
        return vocabulary

    def _first_id(self, tokens: Iterable[str | None]) -> int | None:
        ids = (self._tokenizer.token_to_id(token) for token in tokens if token)
        return next((token for token in ids if token is not None), None)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def tokens(self) -> list[str]:
        return [self._tokenizer.id_to_token(i) or "" for i in range(self.size)]

    def _file_bytes(self) -> bytes:
        return self._tokenizer.to_str().encode()

    @classmethod
    def from_folder(cls, folder: epath.Path, index: dict[str, Any]) -> Self:
        path = folder / cls.file_name
        return cls(_read(path).decode(), index["bos_id"], index["eos_id"], str(path))


KINDS: dict[str, type[Vocabulary]] = {
    kind.kind: kind for kind in (ByteVocabulary, SentencePieceVocabulary, TokenizerVocabulary)
}


def _from_folder(folder: epath.Path) -> Vocabulary:
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text())
        kind = KINDS[index["kind"]]
        if kind.file_name and not (folder / kind.file_name).exists():
            raise CalmError(f"{folder} is damaged: {kind.file_name} is missing")
        return kind.from_folder(folder, index)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CalmError):
            raise
        raise CalmError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _read(path: str | os.PathLike) -> bytes:
    try:
        return epath.Path(path).read_bytes()
    except OSError as error:
        raise CalmError(f"vocabulary file {path}: {error.strerror}") from error


def _content(token: str | dict[str, Any] | None) -> str | None:
    # tokenizer_config.json writes a special token as its text or as a description of it.
    return token["content"] if isinstance(token, dict) else token
