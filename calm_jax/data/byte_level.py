"""Byte-level BPE published as vocab.json and merges.txt, without a tokenizer.json.

These files do not say how text is split before any merge: that depends on the tokenizer class that
transformers has for the model.
"""

from calm_jax.data.tokenizer_files import (
    BYTE_LEVEL_FILE,
    CONFIG_FILE,
    MERGES_FILE,
    MODEL_FILE,
    TokenizerFiles,
)
from calm_jax.errors import CalmError

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2, QWEN2 = "GPT2Tokenizer", "Qwen2Tokenizer"
_CLASS_OF_MODEL = {
    **dict.fromkeys(("gpt2", "gptj", "gpt_neo", "starcoder2"), GPT2),
    **dict.fromkeys(("qwen2", "qwen3"), QWEN2),
}
END = "<|endoftext|>"  # the special token of both classes unless a file names another


def tokenizer_json(published: TokenizerFiles) -> str:
    """A tokenizer.json equivalent to vocab.json, merges.txt and the tokenizer class together.

    Raises `CalmError` if a file is damaged, or the class is not supported.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind = _tokenizer_class(published)
    spaced = bool(published.config.get("add_prefix_space"))
    where = f"{published.folder}/{BYTE_LEVEL_FILE}"
    vocabulary, merges = published.json(BYTE_LEVEL_FILE), _merges(published)
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises bare Exception
        raise CalmError(f"{where} and {MERGES_FILE}: {error}") from error
    if kind == GPT2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    if END in vocabulary:
        tokenizer.add_special_tokens([END])
    if published.adds_start_token:
        _put_start_token(tokenizer, published, kind)
    return tokenizer.to_str()


def _tokenizer_class(published: TokenizerFiles) -> str:
    model = published.json(MODEL_FILE)
    named = published.config.get("tokenizer_class") or model.get("tokenizer_class")
    found = (
        str(named).removesuffix("Fast") if named else _CLASS_OF_MODEL.get(model.get("model_type"))
    )
    if found not in (GPT2, QWEN2):
        said = f"{CONFIG_FILE} has tokenizer_class {named!r}"
        if not named:
            said = f"{MODEL_FILE} has model_type {model.get('model_type')!r}"
        raise CalmError(
            f"{published.folder}: {said}; without a tokenizer.json, {BYTE_LEVEL_FILE} and "
            f"{MERGES_FILE} are read as {GPT2} or {QWEN2} only"
        )
    return found


def _merges(published: TokenizerFiles) -> list[tuple[str, str]]:
    where = f"{published.folder}/{MERGES_FILE}"
    try:
        lines = published.files[MERGES_FILE].decode().split("\n")
    except KeyError:
        raise CalmError(
            f"{where} is missing; {BYTE_LEVEL_FILE} cannot be read without it"
        ) from None
    except UnicodeDecodeError as error:
        raise CalmError(f"{where} is not UTF-8 text") from error
    pairs = []
    for number, line in enumerate((line.removesuffix("\r") for line in lines), 1):
        if line and not line.startswith("#version"):
            pair = tuple(line.split(" "))
            if len(pair) != 2:
                raise CalmError(f"{where}:{number}: {line!r} is not a pair of tokens")
            pairs.append(pair)
    return pairs


def _put_start_token(tokenizer, published: TokenizerFiles, kind: str) -> None:
    from tokenizers import processors

    start = published.special_tokens.get("bos_token", END if kind == GPT2 else None)
    if start is None:
        return
    if tokenizer.token_to_id(start) is None:
        raise CalmError(f"{published.folder}: bos_token {start!r} is not in {BYTE_LEVEL_FILE}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[start, "$A"], special_tokens=[(start, tokenizer.token_to_id(start))]
    )
