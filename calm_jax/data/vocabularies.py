"""Opens the vocabulary that a config, a frozen folder or a published model names."""

import os
from typing import Any

from absl import logging
from etils import epath

from calm_jax.data import built_in
from calm_jax.data.sentencepiece_vocabulary import SentencePieceVocabulary
from calm_jax.data.tokenizer_files import BYTE_LEVEL_FILE, MERGES_FILE, TOKEN_MAPS
from calm_jax.data.tokenizer_vocabulary import TokenizerVocabulary
from calm_jax.data.vocabulary import INDEX_FILE, ByteVocabulary, Vocabulary
from calm_jax.errors import CalmError
from calm_jax.text_files import parse_json

_KINDS: dict[str, type[Vocabulary]] = {
    kind.kind: kind for kind in (ByteVocabulary, SentencePieceVocabulary, TokenizerVocabulary)
}


def load_vocabulary(spec: str | os.PathLike) -> Vocabulary:
    """The vocabulary that `spec` names.

    "bytes" · "key_value" or "key_value/CONFIG" (the key-value task's own) · a SentencePiece model
    "….model" or "….spm" · a tokenizer "….json" · a folder made by `Vocabulary.save`. The files
    that a tokenizer was published with are read from its folder.

    Raises:
        CalmError: nothing has that name, or a file is missing, damaged or contradicts another.
    """
    spec = str(spec)
    if spec == "bytes":
        return ByteVocabulary()
    if (vocabulary := built_in.vocabulary(spec)) is not None:
        return vocabulary
    path = epath.Path(spec)
    if (path / INDEX_FILE).exists():
        return _from_saved(path)
    if path.suffix in (".model", ".spm"):
        return SentencePieceVocabulary.from_published(path)
    if path.suffix == ".json":
        return TokenizerVocabulary.from_published(path)
    raise CalmError(
        f"vocabulary {spec!r} is not 'bytes', 'key_value', a .model, .spm or .json file, "
        f"or a folder with {INDEX_FILE}"
    )


def vocabulary_of_folder(folder: str | os.PathLike) -> Vocabulary | None:
    """The vocabulary of the published model in `folder`; None if there is none.

    That is tokenizer.json, or else tokenizer.model, or else vocab.json with merges.txt, or else the
    only SentencePiece model "….model" or "….spm"; with the files in its folder that
    `calm_jax.data.tokenizer_files` names. Raises `CalmError` as `load_vocabulary`.
    """
    maps = token_maps(epath.Path(folder))
    usual = [path for name in TOKEN_MAPS for path in maps if path.name == name]
    if not usual and len(maps) > 1:
        names = ", ".join(path.name for path in maps)
        raise CalmError(f"{folder} has several SentencePiece models and no tokenizer: {names}")
    return next(map(load_vocabulary, usual or maps), None)


def token_maps(folder: epath.Path) -> list[epath.Path]:
    """The files in a folder that turn text into ids, such as tokenizer.json, by name."""
    names = {"tokenizer.json"}
    if (folder / MERGES_FILE).exists():
        names.add(BYTE_LEVEL_FILE)
    return sorted(
        path for path in folder.iterdir() if path.name in names or path.suffix in (".model", ".spm")
    )


def _from_saved(folder: epath.Path) -> Vocabulary:
    path = folder / INDEX_FILE
    try:
        index = parse_json(path.read_bytes(), path)
        kind = _KINDS[index["kind"]]
        # Older folders do not list published files.
        for name in index.get("files", [kind.file_name] if kind.file_name else []):
            if not (folder / name).exists():
                raise CalmError(f"{folder} is damaged: {name} is missing")
        vocabulary = kind.from_folder(folder, index)
        vocabulary.other_eos_ids = tuple(index.get("other_eos_ids", ()))
        _set_start(vocabulary, index, folder)
        return vocabulary
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CalmError):
            raise
        raise CalmError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _set_start(vocabulary: Vocabulary, index: dict[str, Any], folder: epath.Path) -> None:
    """Sets the ids that start every text, as recorded; older folders record nothing.

    Their texts start as their model may have been trained: with the start token, or else the end
    token, or else id 0, whatever the tokenizer itself does.
    """
    if "start_ids" in index:
        vocabulary.start_ids = tuple(index["start_ids"])
        return
    candidates = (vocabulary.bos_id, vocabulary.eos_id, 0)
    older = next(token for token in candidates if token is not None)
    if vocabulary.start_ids != (older,):
        names = vocabulary.tokens()
        own = " ".join(names[token] for token in vocabulary.start_ids) or "nothing"
        logging.warning(
            "%s was made by an older version of calm_jax: its texts still start with %r, where the "
            "tokenizer itself puts %r; to follow the tokenizer, convert or train the model again",
            folder,
            names[older],
            own,
        )
    vocabulary.start_ids = (older,)
