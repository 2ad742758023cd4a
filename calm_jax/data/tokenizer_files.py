"""The files that a published model's tokenizer consists of, and what they say.

    tokenizer.json            the token map and how text becomes tokens; or else tokenizer.model,
                              or else vocab.json with merges.txt
    tokenizer_config.json     names of the special tokens, added tokens, often the chat template
    special_tokens_map.json   older: names of the special tokens, if the config adds none itself
    added_tokens.json         older: ids of added tokens, if the config adds none itself
    chat_template.jinja       newer: the chat template, which overrides the config's
    chat_template.json        the chat template of a model that takes more than text
    generation_config.json    ids of all tokens that end an answer; or else the model's config.json

All but config.json are kept byte for byte, so that an exported model has its original files.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, Self

from etils import epath

from calm_jax.errors import CalmError
from calm_jax.text_files import parse_json

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
GENERATION_FILE = "generation_config.json"
MODEL_FILE = "config.json"
BYTE_LEVEL_FILE, MERGES_FILE = "vocab.json", "merges.txt"
TOKEN_MAPS = ("tokenizer.json", "tokenizer.model", BYTE_LEVEL_FILE)
BESIDE = (
    MERGES_FILE,
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
    TEMPLATE_FILE,
    "chat_template.json",
    GENERATION_FILE,
)

ADDED_TOKENS_KEY = "added_tokens_decoder"
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# The names of special tokens in chat templates.
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

# Start and end tokens in published tokenizers, for a tokenizer.json without other files.
START_AND_END_NAMES = (
    ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>"),
    ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>"),
)


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """The files that accompany a token map.

    Attributes:
      folder: where they come from, for messages.
      files: their bytes, by name.
      model_file: config.json, which belongs to the model, not the tokenizer; None if missing.
    """

    folder: str = ""
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    model_file: bytes | None = None

    @classmethod
    def read(cls, folder: epath.Path, token_map: str | None) -> Self:
        """Reads the files that accompany `token_map` in `folder`; there may be none."""
        names = [name for name in (*TOKEN_MAPS, *BESIDE) if name != token_map]
        found = {name: read_file(folder / name) for name in names if (folder / name).exists()}
        model = folder / MODEL_FILE
        return cls(str(folder), found, read_file(model) if model.exists() else None)

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; empty if there is no such file."""
        data = self.model_file if name == MODEL_FILE else self.files.get(name)
        values = parse_json(b"{}" if data is None else data, f"{self.folder}/{name}")
        if not isinstance(values, dict):
            raise CalmError(f"{self.folder}/{name} holds {type(values).__name__}, not an object")
        return values

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json, overridden by special_tokens_map.json as in transformers."""
        config = self.json(CONFIG_FILE)
        if ADDED_TOKENS_KEY in config:
            return config
        return config | self.json(SPECIAL_TOKENS_FILE)

    def source_of(self, key: str) -> str:
        """The file that gives a key of `config`, for messages."""
        older = self.config.get(key) != self.json(CONFIG_FILE).get(key)
        return f"{self.folder}/{SPECIAL_TOKENS_FILE if older else CONFIG_FILE}"

    @functools.cached_property
    def special_tokens(self) -> dict[str, str]:
        """The text of each special token that has a role, such as {"bos_token": "<s>"}."""
        found = {role: self._content(role, self.config.get(role)) for role in ROLES}
        return {role: token for role, token in found.items() if token is not None}

    @functools.cached_property
    def all_special(self) -> list[str]:
        """Every special token, first those with a role."""
        key = "extra_special_tokens"
        extra = self.config.get(key) or self.config.get(key := "additional_special_tokens") or []
        if not isinstance(extra, dict | list):
            raise CalmError(f"{self.source_of(key)}: {key} is {type(extra).__name__}")
        listed = extra if isinstance(extra, list) else extra.values()
        contents = [self._content(key, token) for token in listed]
        return [*self.special_tokens.values(), *filter(None, contents)]

    @functools.cached_property
    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """Tokens outside the token map itself, by id, with their flags."""
        if not self.config_adds_tokens:
            return self._older_added_tokens
        given = self.config[ADDED_TOKENS_KEY] or {}
        try:
            listed = {int(index): token for index, token in given.items()}
            if all(isinstance(token["content"], str) for token in listed.values()):
                return listed
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        where = f"{self.folder}/{CONFIG_FILE}: {ADDED_TOKENS_KEY}"
        raise CalmError(f"{where} is not a map of ids to tokens")

    @property
    def config_adds_tokens(self) -> bool:
        """Whether tokenizer_config.json describes added tokens; then its flags count."""
        return ADDED_TOKENS_KEY in self.config

    @property
    def _older_added_tokens(self) -> dict[int, dict[str, Any]]:
        """The tokens of added_tokens.json; they are special if another file says so."""
        given = self.json(ADDED_TOKENS_FILE)
        for content, index in given.items():
            if type(index) is not int:
                where = f"{self.folder}/{ADDED_TOKENS_FILE}"
                raise CalmError(f"{where}: {content!r} has the id {index!r}, not a number")
        return {
            index: {"content": content, "special": content in self.all_special}
            for content, index in given.items()
        }

    def _content(self, key: str, token: Any) -> str | None:
        # A special token is written as its text or as a description of it.
        text = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(text, str):
            raise CalmError(f"{self.source_of(key)}: {key} {token!r} is not a token")
        return text or None

    @property
    def names_tokens(self) -> bool:
        """Whether a file says what the special tokens are, or that there are none."""
        return CONFIG_FILE in self.files or SPECIAL_TOKENS_FILE in self.files

    def check_added_tokens(self, token_id: Callable[[str], int | None], token_map: str) -> None:
        """Raises `CalmError` if an added token has another id in the file `token_map`, or none."""
        for index, token in self.added_tokens.items():
            name, found = token["content"], token_id(token["content"])
            if found != index:
                file = CONFIG_FILE if self.config_adds_tokens else ADDED_TOKENS_FILE
                raise CalmError(
                    f"{self.folder}: {file} gives {name!r} the id {index}, "
                    f"{token_map} {'has no such token' if found is None else found}"
                )

    def end_ids(self, size: int) -> list[int]:
        """Ids that end an answer, from generation_config.json or else config.json; below `size`.

        Empty if neither file names any.
        """
        for name in (GENERATION_FILE, MODEL_FILE):
            values = self.json(name)
            given = values.get("eos_token_id")
            if given is None and isinstance(values.get("text_config"), dict):
                given = values["text_config"].get("eos_token_id")
            ids = [] if given is None else given if isinstance(given, list) else [given]
            for index in ids:
                if type(index) is not int or not 0 <= index < size:
                    where = f"{self.folder}/{name}"
                    raise CalmError(f"{where}: eos_token_id {index!r} is not an id below {size}")
            if ids:
                return ids
        return []

    @property
    def adds_start_token(self) -> bool | None:
        """Whether the tokenizer puts the start token before a text, if no tokenizer.json says so.

        None if only the tokenizer's token map is known.
        """
        if not self.names_tokens and self.model_file is None:
            return None
        given = self.config.get("add_bos_token") or False
        if not isinstance(given, bool):
            raise CalmError(f"{self.folder}/{CONFIG_FILE}: add_bos_token is {given!r}, not a bool")
        return given

    @functools.cached_property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template; among several, the one named "default"."""
        try:
            if TEMPLATE_FILE in self.files:
                return self.files[TEMPLATE_FILE].decode()
        except UnicodeDecodeError as error:
            raise CalmError(f"{self.folder}/{TEMPLATE_FILE} is not UTF-8 text") from error
        for name in (CONFIG_FILE, "chat_template.json"):
            given = self.json(name).get("chat_template")
            try:
                if isinstance(given, list):
                    given = {one["name"]: one["template"] for one in given}
                template = given.get("default") if isinstance(given, dict) else given
            except (TypeError, KeyError) as error:
                raise CalmError(f"{self.folder}/{name}: chat_template lacks a name") from error
            if template is not None and not isinstance(template, str):
                raise CalmError(f"{self.folder}/{name}: chat_template is not text")
            if template is not None:
                return template
        return None

    @property
    def template_file(self) -> str:
        """The file that holds the chat template, for messages."""
        names = (TEMPLATE_FILE, CONFIG_FILE, "chat_template.json")
        return f"{self.folder}/{next((name for name in names if name in self.files), '')}"


NOTHING = TokenizerFiles()


def read_file(path: str | os.PathLike) -> bytes:
    """Raises `CalmError` if the file cannot be read."""
    try:
        return epath.Path(path).read_bytes()
    except OSError as error:
        raise CalmError(f"vocabulary file {path}: {error.strerror or error}") from error
