"""SentencePiece models as vocabularies."""

import functools
import re
from collections.abc import Sequence
from typing import Any, Self

from etils import epath

from calm_jax.data.tokenizer_files import NOTHING, TokenizerFiles, read_file
from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model. `model` is the file's bytes, `path` names it in errors.

    Special tokens written in a text become their ids, as they do in a tokenizer.json of the model;
    the library by itself would spell them out.
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
        self.size = self._processor.get_piece_size()
        self.bos_id, self.eos_id = (
            token if token >= 0 else None
            for token in (self._processor.bos_id(), self._processor.eos_id())
        )

    @classmethod
    def from_published(cls, path: epath.Path) -> Self:
        """Reads `path` and what stands beside it."""
        published = TokenizerFiles.read(path.parent, cls.file_name)
        vocabulary = cls(read_file(path), str(path), published)
        vocabulary._take_special_tokens(path.name)
        return vocabulary

    @functools.cached_property
    def _specials(self) -> set[str]:
        processor = self._processor
        control = {processor.id_to_piece(i) for i in range(self.size) if processor.is_control(i)}
        return control | {t for t in self.published.all_special if self.token_id(t) is not None}

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._specials, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @functools.cached_property
    def _inner_processor(self) -> Any:
        """For text that stands behind another token: it takes no space to begin with."""
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(self._model)
        model.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        rows = self._processor.encode(list(texts), out_type=int, num_threads=1)
        for row, text in enumerate(texts):
            if self._special_pattern.search(text):
                rows[row] = self._encode_around_specials(text)
        return rows

    def _encode_around_specials(self, text: str) -> list[int]:
        ids, end = [], 0
        for found in self._special_pattern.finditer(text):
            ids += self._encode_part(text, end, found.start())
            ids.append(self._processor.piece_to_id(found[0]))
            end = found.end()
        return ids + self._encode_part(text, end, len(text))

    def _encode_part(self, text: str, start: int, end: int) -> list[int]:
        processor = self._inner_processor if start else self._processor
        return processor.encode(text[start:end]) if end > start else []

    def _decode(self, ids: list[int]) -> str:
        hidden = {self._processor.piece_to_id(token) for token in self._specials}
        return self._processor.decode([i for i in ids if 0 <= i < self.size and i not in hidden])

    def tokens(self) -> list[str]:
        return [self._processor.id_to_piece(i) for i in range(self.size)]

    def token_id(self, token: str) -> int | None:
        index = self._processor.piece_to_id(token)
        return index if self._processor.id_to_piece(index) == token else None

    def _file_bytes(self) -> bytes:
        return self._model

    @classmethod
    def from_folder(
        cls, folder: epath.Path, index: dict[str, Any], published: TokenizerFiles
    ) -> Self:
        path = folder / cls.file_name
        vocabulary = cls(read_file(path), str(path), published)
        vocabulary.bos_id, vocabulary.eos_id = index["bos_id"], index["eos_id"]
        return vocabulary
