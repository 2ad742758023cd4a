"""The tokenizer files of a published model, from the metadata of a GGUF file.

The tokenizer is the one that transformers makes from such a file: its pieces and merges, in the
form of its kind (byte-level BPE, or SentencePiece as Llama or Gemma use it). Control tokens become
special tokens, user-defined ones added tokens.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from calm_jax.checkpoints.convert import huggingface_config as read
from calm_jax.checkpoints.files import explained
from calm_jax.errors import CalmError

CONTROL, USER_DEFINED = 3, 4  # kinds of tokens
SPACE = "▁"  # as SentencePiece writes it
_ENDS = ("eos", "eot", "eom")  # end of a text, a turn, a message; each ends an answer
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LAST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_LLAMA_3 = rf"{_SHORT}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_LAST}"
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")
_GPT_4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SHORT}?|{_BEFORE}{_UPPER}+{_LOWER}*{_SHORT}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_LAST}"
)
_TEKKEN = _GPT_4O.replace(f"{_SHORT}?", "").replace("{1,3}", "")
# Patterns of words that merges do not cross, by the names of `tokenizer.ggml.pre`; None: the
# pattern of GPT-2.
_WORDS = {
    **dict.fromkeys(("default", "gpt-2", "olmo", "phi-2", "smollm", "starcoder", "refact")),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "smaug-bpe", "midm-2.0"), _LLAMA_3
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN_2),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT_4O),
    "tekken": _TEKKEN,
}


def tokenizer_files(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """tokenizer.json and its accompanying files, by name; none if the file has no tokenizer.

    Raises:
        CalmError: the kind of tokenizer is not supported, or a key is missing or contradicts
            another.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return {}
    tokens = _list(metadata, "tokens", str, where)
    kinds = [0] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        kinds = _list(metadata, "token_type", int, where, len(tokens))
    with explained(f"{where}: tokenizer.ggml"):  # the library raises bare Exception
        if kind == "gpt2":
            tokenizer = _byte_level(metadata, tokens, where)
        elif kind == "llama" and str(metadata["general.architecture"]).startswith("gemma"):
            tokenizer = _gemma(metadata, tokens, where)
        elif kind == "llama":
            tokenizer = _llama(metadata, tokens, where)
        else:
            raise CalmError(
                f"{where}: tokenizer.ggml.model is {kind!r}; supported are 'gpt2' and 'llama'"
            )
        _add_tokens(tokenizer, tokens, kinds, is_byte_level=kind == "gpt2")
        config = _config(metadata, tokens, where)
        _add_start_and_end(tokenizer, config)
    ends = [_token_id(metadata, role, tokens, where) for role in _ENDS]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)}
    if ends:
        files["generation_config.json"] = json.dumps({"eos_token_id": ends})
    return {name: text.encode() for name, text in files.items()}


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> Any:
    """BPE on bytes, each written as a letter."""
    words = metadata.get("tokenizer.ggml.pre")
    if words not in _WORDS:
        told = "missing" if words is None else f"{words!r}"
        raise CalmError(f"{where}: tokenizer.ggml.pre is {told}; supported are {', '.join(_WORDS)}")
    letters = _letters()
    vocabulary = {
        token if letters.issuperset(token) else _in_letters(token): index
        for index, token in enumerate(tokens)
    }
    merges = _merges(metadata, where)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if _WORDS[words] is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_WORDS[words]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _llama(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> Any:
    """SentencePiece with a space put before the text, unless the file says otherwise."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in metadata:
        merges = _merges(metadata, where)
    else:
        scores = _list(metadata, "scores", float, where, len(tokens))
        merges = _implied_merges(vocabulary, dict(zip(tokens, scores, strict=True)))
    model = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    puts_space = read.boolean(metadata, "tokenizer.ggml.add_space_prefix", where, True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme="first" if puts_space else "never", split=False
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if puts_space:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _gemma(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> Any:
    """SentencePiece in which earlier pieces are merged first, whatever their scores."""
    # Pieces that consist only of spaces are stored as spaces.
    names = [SPACE * len(t) if t and not t.strip(" ") else t for t in tokens]
    vocabulary = {token: index for index, token in enumerate(names)}
    if "tokenizer.ggml.merges" in metadata:
        merges = _merges(metadata, where)
    else:
        merges = _implied_merges(vocabulary, {t: -index for t, index in vocabulary.items()})
    unknown = _token_id(metadata, "unknown", tokens, where)
    model = models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token="<unk>" if unknown is None else names[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _merges(metadata: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    pairs = [tuple(line.split(" ")) for line in _list(metadata, "merges", str, where)]
    for pair in pairs:
        if len(pair) != 2:
            raise CalmError(f"{where}: tokenizer.ggml.merges has {' '.join(pair)!r}, not a pair")
    return pairs


def _implied_merges(
    vocabulary: Mapping[str, int], scores: Mapping[str, float]
) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third; pieces with a higher score come first.

    SentencePiece lists no merges: of all neighbouring pieces in a text that join to a piece, it
    merges those whose result has the best score.
    """
    pairs = []
    for piece, score in scores.items():
        cuts = range(1, len(piece))
        found = [(piece[:cut], piece[cut:]) for cut in cuts]
        found = [pair for pair in found if pair[0] in vocabulary and pair[1] in vocabulary]
        found.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        pairs += [(score, len(left), len(right), left, right) for left, right in found]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [pair[3:] for pair in pairs]


def _add_tokens(
    tokenizer: Any, tokens: Sequence[str], kinds: Sequence[int], *, is_byte_level: bool
) -> None:
    """Adds tokens that are recognised anywhere in a text."""
    letters, vocabulary = _letters(), tokenizer.get_vocab()
    special, added = [], []
    for token, kind in zip(tokens, kinds, strict=True):
        # A control token that cannot be written in letters is an ordinary token, wrongly marked.
        if kind == CONTROL and (letters.issuperset(token) or not is_byte_level):
            special.append(tokenizers.AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED and token in vocabulary:
            added.append(tokenizers.AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(added)


def _config(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> dict[str, Any]:
    """tokenizer_config.json."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, name in _ROLES.items():
        index = _token_id(metadata, name, tokens, where)
        if index is not None:
            config[f"{role}_token"] = tokens[index]
    # Older SentencePiece files do not say so, but mean a start token.
    puts_start = metadata["tokenizer.ggml.model"] == "llama"
    for role, default in (("bos", puts_start), ("eos", False)):
        flag = read.boolean(metadata, f"tokenizer.ggml.add_{role}_token", where, default)
        config[f"add_{role}_token"] = flag and f"{role}_token" in config
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise CalmError(f"{where}: tokenizer.chat_template is {template!r}, not text")
        config["chat_template"] = template
    return config


def _add_start_and_end(tokenizer: Any, config: Mapping[str, Any]) -> None:
    start = [config["bos_token"]] if config["add_bos_token"] else []
    end = [config["eos_token"]] if config["add_eos_token"] else []
    if start or end:
        ids = [(token, tokenizer.token_to_id(token)) for token in {*start, *end}]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*start, "$A", *end], special_tokens=ids
        )


def _token_id(
    metadata: Mapping[str, Any], name: str, tokens: Sequence[str], where: str
) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    index = metadata.get(key)
    if index is not None and (type(index) is not int or not 0 <= index < len(tokens)):
        raise CalmError(
            f"{where}: {key} is {index!r}, not the id of one of its {len(tokens)} tokens"
        )
    return index


def _list(
    metadata: Mapping[str, Any], name: str, kind: type, where: str, length: int | None = None
) -> list:
    """A list in the metadata, with values of this kind and of this length."""
    key = f"tokenizer.ggml.{name}"
    values = metadata.get(key)
    if values is None:
        raise CalmError(f"{where}: {key} is missing")
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise CalmError(f"{where}: {key} is not a list of {kind.__name__}")
    if length is not None and len(values) != length:
        raise CalmError(f"{where}: {key} has {len(values)} entries for {length} tokens")
    return values


def _letters() -> frozenset[str]:
    """The letters with which byte-level BPE writes bytes."""
    return frozenset(pre_tokenizers.ByteLevel.alphabet())


def _in_letters(token: str) -> str:
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(text for text, _ in splitter.pre_tokenize_str(token))
