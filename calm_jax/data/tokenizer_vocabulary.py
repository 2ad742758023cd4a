"""Vocabularies from a `tokenizer.json`, read with the `tokenizers` library."""

import functools
import itertools
import json
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Self

from etils import epath

from calm_jax.data import byte_level, token_texts
from calm_jax.data.tokenizer_files import (
    ADDED_TOKEN_FLAGS,
    BYTE_LEVEL_FILE,
    NOTHING,
    START_AND_END_NAMES,
    TokenizerFiles,
    read_file,
)
from calm_jax.data.vocabulary import UNKNOWN_TEXT, Vocabulary
from calm_jax.errors import CalmError


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
        published: TokenizerFiles = NOTHING,
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
        self.start_ids = self._put_before_text()

    def _add_published_tokens(self) -> None:
        """Takes tokens and flags from tokenizer.json's other files, as transformers does."""
        import tokenizers

        known = self._tokenizer.get_added_tokens_decoder()
        added = []
        for index, token in sorted(self.published.added_tokens.items()):
            if self.published.config_adds_tokens or index not in known:
                flags = {key: bool(token[key]) for key in ADDED_TOKEN_FLAGS if key in token}
                added.append(tokenizers.AddedToken(token["content"], **flags))
        self._tokenizer.add_tokens(added)
        known = self._tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in known if token.special}
        missing = [
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token in self.published.all_special
            if token not in special and self.token_id(token) is not None
        ]
        self._tokenizer.add_special_tokens(missing)

    def _put_before_text(self) -> tuple[int, ...]:
        """Ids that the tokenizer's post-processor puts before a text."""
        if self._tokenizer.post_processor is None:
            return ()
        # Any text that has a token in this vocabulary will do.
        for text in itertools.chain(["a"], (self._tokenizer.id_to_token(i) for i in range(100))):
            encoding = self._tokenizer.encode(text or "")
            if 0 in encoding.special_tokens_mask:
                return tuple(encoding.ids[: encoding.special_tokens_mask.index(0)])
        return ()

    @classmethod
    def from_published(cls, path: epath.Path) -> Self:
        """Reads tokenizer.json, or vocab.json with merges.txt, and the files that accompany it."""
        published = TokenizerFiles.read(path.parent, cls.file_name)
        is_pair = path.name == BYTE_LEVEL_FILE
        text = byte_level.tokenizer_json(published) if is_pair else read_file(path)
        vocabulary = cls(text, None, None, str(path), published)
        if is_pair:
            vocabulary.eos_id = vocabulary.token_id(byte_level.END)
        elif not published.names_tokens:
            vocabulary.bos_id, vocabulary.eos_id = map(vocabulary._first_id, START_AND_END_NAMES)
        vocabulary._take_special_tokens(path.name)
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

    def encode_inside(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @functools.cached_property
    def _inner(self) -> Any:
        """The tokenizer for text after other text: it adds no space at the beginning."""
        import tokenizers

        values = dict(self._json)
        for key in ("normalizer", "pre_tokenizer"):
            values[key] = token_texts.without_space_before(values[key])
        return tokenizers.Tokenizer.from_str(json.dumps(values))

    def lost_character(self, text: str) -> str | None:
        encoding = self._inner.encode(text, add_special_tokens=False)
        unknown = self.unknown_id
        # A text may also spell the token of unknown text, which loses nothing.
        spelled = None if unknown is None else self._tokenizer.id_to_token(unknown)
        kept = {
            index
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token != unknown or text[start:end].strip() == spelled
            for index in range(start, end)
        }
        lost = next((c for i, c in enumerate(text) if i not in kept and _is_seen(c)), None)
        if lost is None or unknown is not None:
            return lost
        # Where characters have no token at all, the offsets of those behind them are wrong.
        ids = zip(text, self.encode_inside(text), strict=True)
        return next((c for c, of_c in ids if not of_c and _is_seen(c)), lost)

    @functools.cached_property
    def _json(self) -> dict[str, Any]:
        return json.loads(self._tokenizer.to_str())

    @property
    def unknown_id(self) -> int | None:
        model = self._json["model"]
        token = model.get("unk_token")
        return model.get("unk_id") if token is None else self.token_id(token)

    def token_bytes(self) -> list[bytes]:
        as_bytes = token_texts.reader(self._json["decoder"], str(self))
        added = self._tokenizer.get_added_tokens_decoder()
        found = [as_bytes(token) for token in self.tokens()]
        for index, token in added.items():
            found[index] = b"" if token.special else token.content.encode()
        if self.unknown_id is not None:
            found[self.unknown_id] = UNKNOWN_TEXT.encode()
        return found

    @property
    def space_before_text(self) -> bool:
        return token_texts.omits_first_space(self._json["decoder"])

    @functools.cached_property
    def whole_texts(self) -> tuple[str, ...]:
        added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        words = self.tokens() if self._json["model"]["type"] == "WordLevel" else []
        return tuple(text for text in dict.fromkeys([*added, *words]) if len(text) > 1)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def tokens(self) -> list[str]:
        return [self._tokenizer.id_to_token(i) or "" for i in range(self.size)]

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _file_bytes(self) -> bytes:
        return self._text

    @classmethod
    def from_folder(cls, folder: epath.Path, index: dict[str, Any]) -> Self:
        path, published = folder / cls.file_name, TokenizerFiles.read(folder, cls.file_name)
        return cls(read_file(path), index["bos_id"], index["eos_id"], str(path), published)


def _is_seen(character: str) -> bool:
    """Whether no normaliser may drop a character: not a space, a control or without a shape."""
    return not (character.isspace() or unicodedata.category(character) in ("Cc", "Cf", "Mn"))
