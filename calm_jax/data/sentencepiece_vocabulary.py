"""SentencePiece models as vocabularies."""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any, Self

from etils import epath

from calm_jax.data.tokenizer_files import NOTHING, TokenizerFiles, read_file
from calm_jax.data.vocabulary import UNKNOWN_TEXT, Vocabulary
from calm_jax.errors import CalmError


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model. `model` is the file's bytes, `path` names it in errors.

    Special and added tokens written in a text become their ids, as with the model's tokenizer.json;
    the library alone would spell them out.
    """

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, model: bytes, path: str, published: TokenizerFiles = NOTHING):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise CalmError(f"{path} is not a SentencePiece model") from error
        self._model, self.published = model, published
        self._pieces = self._processor.get_piece_size()
        self._added = self._tokens_behind_pieces(path)
        self.size = self._pieces + len(self._added)
        self.bos_id, self.eos_id = (
            token if token >= 0 else None
            for token in (self._processor.bos_id(), self._processor.eos_id())
        )
        self._set_start()

    def _tokens_behind_pieces(self, path: str) -> list[str]:
        """The added tokens for which the model has no pieces, in the order of their ids."""
        added = sorted(self.published.added_tokens.items())
        behind = [(index, token["content"]) for index, token in added if index >= self._pieces]
        for expected, (index, name) in enumerate(behind, self._pieces):
            if index != expected:
                raise CalmError(
                    f"{path}: the added token {name!r} has the id {index}, but no token has the id "
                    f"{expected}"
                )
        return [name for _, name in behind]

    def _set_start(self) -> None:
        # The model itself does not say whether its start token comes first.
        named = self.bos_id is not None and self.published.adds_start_token is not False
        self.start_ids = (self.bos_id,) if named else ()

    @classmethod
    def from_published(cls, path: epath.Path) -> Self:
        """Reads `path` and the tokenizer files in its folder."""
        published = TokenizerFiles.read(path.parent, cls.file_name)
        vocabulary = cls(read_file(path), str(path), published)
        vocabulary._take_special_tokens(path.name)
        vocabulary._set_start()
        return vocabulary

    @property
    def base_size(self) -> int:
        return self._pieces

    @functools.cached_property
    def _specials(self) -> set[str]:
        """Tokens that decoding omits."""
        processor = self._processor
        control = {processor.id_to_piece(i) for i in range(self._pieces) if processor.is_control(i)}
        added = {t["content"] for t in self.published.added_tokens.values() if t.get("special")}
        named = {t for t in self.published.all_special if self.token_id(t) is not None}
        return control | added | named

    @functools.cached_property
    def _whole_tokens(self) -> tuple[re.Pattern[str], list[str]]:
        """A pattern of the tokens that are found in a text before it is split into pieces.

        Group i + 1 of the pattern is the i-th of the tokens.
        """
        added = {token["content"]: token for token in self.published.added_tokens.values()}
        tokens = sorted({*self._specials, *added}, key=len, reverse=True)
        patterns = []
        for token in tokens:
            flags = added.get(token, {})
            pattern = re.escape(token)
            if flags.get("single_word"):
                pattern = rf"(?<!\w){pattern}(?!\w)"
            left, right = (r"\s*" if flags.get(flag) else "" for flag in ("lstrip", "rstrip"))
            patterns.append(f"({left}{pattern}{right})")
        return re.compile("|".join(patterns) or "(?!)"), tokens

    @functools.cached_property
    def _inner_processor(self) -> Any:
        """The processor for text after another token: it adds no space at the beginning."""
        import sentencepiece

        model = type(self._proto)()
        model.CopyFrom(self._proto)
        model.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(self._processor, texts)

    def encode_inside(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._proto.normalizer_spec.remove_extra_whitespaces:
            return self._encode(self._inner_processor, texts)
        # The model drops spaces at the beginning of a text, but may put one there itself.
        outer, inner = self._processor, self._inner_processor
        return [self._encode(outer if text[:1].isspace() else inner, [text])[0] for text in texts]

    def _encode(self, first: Any, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts; the processor `first` encodes the beginning of each."""
        rows = first.encode(list(texts), out_type=int, num_threads=1)
        pattern, _ = self._whole_tokens
        for row, text in enumerate(texts):
            if pattern.search(text):
                rows[row] = self._encode_around_tokens(first, text)
        return rows

    def _encode_around_tokens(self, first: Any, text: str) -> list[int]:
        pattern, tokens = self._whole_tokens
        ids, end = [], 0

        def encode_part(start: int, end: int) -> list[int]:
            processor = self._inner_processor if start else first
            return processor.encode(text[start:end]) if end > start else []

        for found in pattern.finditer(text):
            ids += encode_part(end, found.start())
            ids.append(self.token_id(tokens[found.lastindex - 1]))
            end = found.end()
        return ids + encode_part(end, len(text))

    @property
    def unknown_id(self) -> int:
        return self._processor.unk_id()

    def lost_character(self, text: str) -> str | None:
        unknown, (pattern, _) = self.unknown_id, self._whole_tokens
        # Between whole tokens, of which the token of unknown text may be one.
        for part in pattern.split(text)[:: pattern.groups + 1]:
            if unknown in self.encode_inside([part])[0]:
                return next((c for c in part if unknown in self.encode_inside([c])[0]), part)
        return None

    def token_bytes(self) -> list[bytes]:
        processor, hidden = self._processor, self._specials

        def of_piece(index: int) -> bytes:
            piece = processor.id_to_piece(index)
            if processor.is_unknown(index):
                return UNKNOWN_TEXT.encode()
            if processor.is_byte(index):
                return bytes([int(piece[1:-1], 16)])
            return b"" if piece in hidden else piece.replace("▁", " ").encode()

        behind = [b"" if token in hidden else token.encode() for token in self._added]
        return [*map(of_piece, range(self._pieces)), *behind]

    @functools.cached_property
    def _proto(self) -> Any:
        from sentencepiece import sentencepiece_model_pb2

        return sentencepiece_model_pb2.ModelProto.FromString(self._model)

    @property
    def space_before_text(self) -> bool:
        spec = self._proto.normalizer_spec
        return spec.add_dummy_prefix or spec.remove_extra_whitespaces

    @functools.cached_property
    def whole_texts(self) -> tuple[str, ...]:
        kind = self._proto.SentencePiece.USER_DEFINED
        defined = [p.piece.replace("▁", " ") for p in self._proto.pieces if p.type == kind]
        texts = dict.fromkeys([*self._whole_tokens[1], *defined])
        return tuple(text for text in texts if len(text) > 1)

    def _decode(self, ids: list[int]) -> str:
        hidden = {self.token_id(token) for token in self._specials}
        shown = [i for i in ids if 0 <= i < self.size and i not in hidden]
        text, processor = "", self._processor
        for behind, group in itertools.groupby(shown, lambda i: i >= self._pieces):
            if behind:
                text += "".join(self._added[i - self._pieces] for i in group)
            else:
                text += processor.decode(list(group))
            processor = self._inner_processor  # later pieces keep the space that they begin with
        return text

    def tokens(self) -> list[str]:
        return [*(self._processor.id_to_piece(i) for i in range(self._pieces)), *self._added]

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._pieces + self._added.index(token)
        index = self._processor.piece_to_id(token)
        return index if self._processor.id_to_piece(index) == token else None

    def _file_bytes(self) -> bytes:
        return self._model

    @classmethod
    def from_folder(cls, folder: epath.Path, index: dict[str, Any]) -> Self:
        path = folder / cls.file_name
        vocabulary = cls(read_file(path), str(path), TokenizerFiles.read(folder, cls.file_name))
        vocabulary.bos_id, vocabulary.eos_id = index["bos_id"], index["eos_id"]
        return vocabulary
