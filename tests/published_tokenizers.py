"""Folders of tokenizer files as they are published, each with a fact that is easily missed.

All are written by hand, nothing is trained: so what transformers makes of them can be committed.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

MERGES = ["Ġ t", "h e", "Ġt he", "f i", "r s", "fi rs", "firs t", "Ġ first", "Ġ d", "o g", "Ġd og"]
PIECES = ["▁", "▁the", "▁first", "▁dog", "first", "dog", *"thefirsdog", "é", "<user>"]
MERGED = ["▁t", "he", "fi", "rs", "firs", "do"]  # on the way to the longer pieces
TEXTS = [
    "the first",
    "the first dog",
    " dog",
    "first dog\n",
    "a <tool> b",
    "the<tool> dog <end> dog",
    "é <user> dog",
    "dog<user>dog",
    "the  first",
]
CONTINUATIONS = [("the first", " dog"), ("the", "first"), ("dog <tool>", "dog"), ("", "the dog")]


def _write(folder: pathlib.Path, name: str, values: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))


def _byte_level_vocabulary() -> dict[str, int]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", *alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    return {token: index for index, token in enumerate(tokens)}


def _byte_level(
    folder: pathlib.Path,
    config: dict[str, Any],
    *,
    start: str = "",
    added: tuple[tokenizers.AddedToken, ...] = (),
    generation: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> None:
    """tokenizer.json of byte-level BPE whose post-processor puts `start` first, if anything."""
    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    tokenizer = tokenizers.Tokenizer(models.BPE(_byte_level_vocabulary(), pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(list(added))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[start, "$A"], special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | config)
    _write(folder, "config.json", {"model_type": "llama"} | (model or {}))
    if generation is not None:
        _write(folder, "generation_config.json", generation)


def _sentencepiece(
    folder: pathlib.Path,
    config: dict[str, Any] | None,
    added_tokens: dict[str, int] | None = None,
    model: dict[str, Any] | None = None,
) -> None:
    """tokenizer.model alone, as Llama 2 was first published."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    proto = protobuf.ModelProto()
    kinds = [
        ("<unk>", 2),
        ("<s>", 3),
        ("</s>", 3),
        *((f"<0x{byte:02X}>", 6) for byte in range(256)),
    ]
    names = dict.fromkeys(PIECES)
    for piece, kind in [*kinds, *((name, 4 if name == "<user>" else 1) for name in names)]:
        score = -float(len(proto.pieces)) if kind == 1 else 0.0
        proto.pieces.add(piece=piece, type=kind, score=score)
    for merged in MERGED:
        proto.pieces.add(piece=merged, type=1, score=-float(len(proto.pieces)))
    spec = proto.trainer_spec
    spec.model_type, spec.byte_fallback, spec.vocab_size = 2, True, len(proto.pieces)
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 0, 1, 2, -1
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    if config is not None:
        _write(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"} | config)
    if added_tokens is not None:
        _write(folder, "added_tokens.json", added_tokens)
    _write(folder, "config.json", {"model_type": "llama"} | (model or {}))


def _pair(folder: pathlib.Path, config: dict[str, Any] | None, model_type: str) -> None:
    """vocab.json and merges.txt alone, as GPT-2 was first published."""
    _write(folder, "vocab.json", _byte_level_vocabulary())
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    if config is not None:
        _write(folder, "tokenizer_config.json", config)
    _write(folder, "config.json", {"model_type": model_type})


_PIECE_COUNT = 3 + 256 + len(dict.fromkeys(PIECES)) + len(MERGED)
_BYTE_COUNT = len(MERGES) + 257
_NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
_FLAGS = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
_TOOL = tokenizers.AddedToken("<tool>", lstrip=False, special=True, normalized=False)

FOLDERS: dict[str, Callable[[pathlib.Path], None]] = {
    "start token named": lambda f: _byte_level(f, _NAMED),
    "start token named and denied": lambda f: _byte_level(f, _NAMED | {"add_bos_token": False}),
    "start token named and asked for": lambda f: _byte_level(f, _NAMED | {"add_bos_token": True}),
    "start token put": lambda f: _byte_level(f, _NAMED, start="<|im_start|>"),
    "start token put and denied": lambda f: _byte_level(
        f, _NAMED | {"add_bos_token": False}, start="<|im_start|>"
    ),
    "no start token": lambda f: _byte_level(f, {"eos_token": "<|im_end|>"}),
    "ends of generation_config.json": lambda f: _byte_level(
        f, _NAMED, generation={"eos_token_id": [0, 5]}, model={"eos_token_id": [7]}
    ),
    "ends of config.json": lambda f: _byte_level(f, _NAMED, model={"eos_token_id": [1, 2]}),
    "one end of config.json": lambda f: _byte_level(f, _NAMED, model={"eos_token_id": 2}),
    "flags of tokenizer_config.json": lambda f: _byte_level(
        f,
        _NAMED
        | {
            "added_tokens_decoder": {
                str(_BYTE_COUNT + 2): {"content": "<tool>", "special": False, **_FLAGS},
                str(_BYTE_COUNT + 3): {"content": "<end>", "special": True, **_FLAGS},
            }
        },
        added=(_TOOL,),
    ),
    "added_tokens.json beside tokenizer.json": lambda f: (
        _byte_level(f, _NAMED, added=(_TOOL,)),
        _write(f, "added_tokens.json", {"<tool>": _BYTE_COUNT + 2, "<end>": _BYTE_COUNT + 3}),
    ),
    "tokenizer.model": lambda f: _sentencepiece(f, None),
    "tokenizer.model, start token asked for": lambda f: _sentencepiece(f, {"add_bos_token": True}),
    "tokenizer.model, start token denied": lambda f: _sentencepiece(f, {"add_bos_token": False}),
    "added_tokens.json beside tokenizer.model": lambda f: _sentencepiece(
        f,
        {"add_bos_token": True, "eos_token": "<end>"},
        {"<end>": _PIECE_COUNT + 1, "<tool>": _PIECE_COUNT},
        {"eos_token_id": _PIECE_COUNT + 1},
    ),
    "config adds tokens to tokenizer.model": lambda f: _sentencepiece(
        f,
        {
            "added_tokens_decoder": {
                str(_PIECE_COUNT): {"content": "<tool>", "special": True, **_FLAGS},
                str(_PIECE_COUNT + 1): {"content": "<end>", "special": False},
            }
        },
    ),
    "vocab.json, GPT-2": lambda f: _pair(f, None, "gpt2"),
    "vocab.json, Qwen 2": lambda f: _pair(f, {"tokenizer_class": "Qwen2Tokenizer"}, "qwen2"),
    "vocab.json, start token asked for": lambda f: _pair(
        f, {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}, "gpt2"
    ),
    "vocab.json, added tokens": lambda f: _pair(
        f,
        {
            "tokenizer_class": "GPT2TokenizerFast",
            "eos_token": "<end>",
            "added_tokens_decoder": {
                str(_BYTE_COUNT): {"content": "<tool>", "special": False, **_FLAGS},
                str(_BYTE_COUNT + 1): {"content": "<end>", "special": True},
            },
        },
        "gpt2",
    ),
}
