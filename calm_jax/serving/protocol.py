"""Checks the bodies of requests to OpenAI's API, and turns them into prompts for the engine."""

import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import Any

from calm_jax.decoding import Sampling
from calm_jax.decoding.generator import encode
from calm_jax.errors import CalmError
from calm_jax.serving.engine_thread import ServedModel
from calm_jax.serving.errors import Refused

_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "n": 1,
    "seed": None,
    "stop": None,
}
_COMMON = {"model": None, "max_tokens": None, "stream": False, "stream_options": None, **_SAMPLING}
_COMPLETION = {**_COMMON, "prompt": None, "echo": False, "logprobs": None}
_CHAT = {
    **_COMMON,
    "messages": None,
    "max_completion_tokens": None,
    "logprobs": False,
    "top_logprobs": None,
}
# Fields that do not affect the answer.
_SILENT = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields that are not supported: their only allowed value has no effect.
_NEUTRAL = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "best_of": 1,
    "suffix": "",
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "modalities": ["text"],
}
_DEFAULT_TOKENS = 16  # OpenAI's default for completions
_MOST_STOPS = 16  # OpenAI's server takes 4; lm-evaluation-harness sends more
_MOST = 1e30  # largest number allowed, which float32 can hold


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a body asks for."""

    model: ServedModel
    is_chat: bool
    texts: list[str]  # the texts of the prompts, for an echo; prompts of ids are decoded
    prompts: list[list[int]]  # the ids of the prompts
    sampling: Sampling  # options of the answers; if no token is asked for, answers have one token
    scores_only: bool = False  # whether no token is asked for
    echo: bool = False
    stream: bool = False
    include_usage: bool = False

    @property
    def answers(self) -> int:
        return self.sampling.n * len(self.prompts)

    @property
    def score_from(self) -> int | None:
        scores_prompt = self.echo and self.sampling.logprobs is not None
        return 1 if self.scores_only or scores_prompt else None


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a body; raises `Refused`."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body.decode(), parse_constant=refuse)
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None
    except ValueError as error:  # bad JSON or UTF-8, or an integer that is too long
        raise Refused(400, f"the body is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise Refused(400, f"the body is {_kind(value)}; it must be an object")
    return value


def parse_completion(body: bytes, models: Mapping[str, ServedModel], most_tokens: int) -> Asked:
    """What a body of /v1/completions asks for; raises `Refused`."""
    given = _fields(parse_json(body), _COMPLETION)
    model = _model(given["model"], models)
    prompts = _prompts(given["prompt"])
    echo, logprobs = _flag(given, "echo"), given["logprobs"]
    if logprobs is not None:
        _whole("logprobs", logprobs, 0, 5)
    tokens = _DEFAULT_TOKENS if given["max_tokens"] is None else given["max_tokens"]
    _whole("max_tokens", tokens, 0 if echo else 1, most_tokens)
    ids = [_encoded(model, x) if isinstance(x, str) else x for x in prompts]
    texts = [x if isinstance(x, str) else _decoded(model, x) if echo else "" for x in prompts]
    asked = _asked(given, model, False, texts, ids, tokens, logprobs)
    return dataclasses.replace(asked, echo=echo)


def parse_chat(body: bytes, models: Mapping[str, ServedModel], most_tokens: int) -> Asked:
    """What a body of /v1/chat/completions asks for; raises `Refused`."""
    given = _fields(parse_json(body), _CHAT)
    model = _model(given["model"], models)
    if model.vocabulary.chat_template is None:
        line = f"the vocabulary of {model.name} has no chat template; use /v1/completions"
        raise Refused(400, line, param="messages", code="no_chat_template")
    try:
        text = model.vocabulary.chat(_messages(given["messages"]))
    except CalmError as error:
        raise Refused(400, str(error), param="messages") from None
    ids = _encoded(model, text)
    name = "max_tokens" if given["max_completion_tokens"] is None else "max_completion_tokens"
    tokens = given[name]
    if tokens is None:
        tokens = max(1, min(most_tokens, model.max_length - len(ids)))
    _whole(name, tokens, 1, most_tokens)
    top = given["top_logprobs"]
    if top is not None:
        _whole("top_logprobs", top, 0, 20)
    logprobs = (top or 0) if _flag(given, "logprobs") else None
    if top is not None and logprobs is None:
        raise Refused(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return _asked(given, model, True, [text], [ids], tokens, logprobs)


def _asked(given, model, is_chat, texts, ids, tokens, logprobs) -> Asked:
    for prompt in ids:
        if len(prompt) + max(1, tokens) > model.max_length:
            raise Refused(
                400,
                f"the prompt has {len(prompt)} tokens and the answer may have {tokens}, together "
                f"more than this model's limit {model.max_length}",
                param="messages" if is_chat else "prompt",
                code="context_length_exceeded",
            )
    stop = given["stop"]
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > _MOST_STOPS:
        raise Refused(400, f"stop must be a text or up to {_MOST_STOPS} texts", param="stop")
    for text in stop:
        _text("stop", text)
    seed = secrets.randbits(63) if given["seed"] is None else given["seed"]
    _whole("seed", seed, -(2**63), 2**63 - 1)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if type(given[name]) not in (int, float) or not abs(given[name]) < _MOST:
            raise Refused(400, f"{name} must be a finite number", param=name)
    try:
        sampling = Sampling(
            max_new_tokens=max(1, tokens),
            temperature=given["temperature"] or 1.0,
            repetition_penalty=given["repetition_penalty"],
            stop=tuple(stop),
            n=given["n"],
            seed=seed % 2**63,
            logprobs=logprobs,
            **{name: given[name] for name in ("top_p", "top_k", "min_p")},
        )
        if given["temperature"] == 0:
            # Without random choice the others have no effect, but clients send them anyway.
            neutral = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
            sampling = dataclasses.replace(sampling, **neutral)
    except CalmError as error:
        message = str(error)
        param = message.partition(" ")[0]
        raise Refused(400, message, param=param if param in _SAMPLING else None) from None
    stream = _flag(given, "stream")
    options = {} if given["stream_options"] is None else given["stream_options"]
    if not isinstance(options, dict) or (options and not stream):
        line = "stream_options must be an object, and needs stream: true"
        raise Refused(400, line, param="stream_options")
    options = _fields(options, {"include_usage": False, "include_obfuscation": False})
    return Asked(
        model,
        is_chat,
        texts,
        ids,
        sampling,
        scores_only=tokens == 0,
        stream=stream,
        include_usage=_flag(options, "include_usage"),
    )


def _fields(body: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all known fields; null is the default. Refuses fields without an effect."""
    for name, value in body.items():
        if name in known or name in _SILENT or value is None:
            continue
        shown = name[:80].encode(errors="replace").decode()
        if name not in _NEUTRAL:
            raise Refused(400, f"unknown field {shown!r}", param=shown)
        # To Python `1 == True`, so kinds are compared too.
        if value != _NEUTRAL[name] or isinstance(value, bool):
            line = f"{name} is not supported; it must be {json.dumps(_NEUTRAL[name])}"
            raise Refused(400, line, param=name)
    return {
        name: default if body.get(name) is None else body[name] for name, default in known.items()
    }


def _model(name: Any, models: Mapping[str, ServedModel]) -> ServedModel:
    if name is None:
        return next(iter(models.values()))
    if not isinstance(name, str) or name not in models:
        shown = (
            name[:200].encode(errors="replace").decode() if isinstance(name, str) else _kind(name)
        )
        line = f"there is no model {shown!r}; there are {', '.join(models)}"
        raise Refused(404, line, param="model", code="model_not_found")
    return models[name]


def _prompts(prompt: Any) -> list[str | list[int]]:
    """Prompts of each of the four forms."""
    forms = "a text, a list of texts, a list of ids or a list of lists of ids"
    is_ids = isinstance(prompt, list) and all(type(item) is int for item in prompt)
    if isinstance(prompt, str) or (is_ids and prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise Refused(400, f"prompt must be {forms}", param="prompt")
    for item in prompt:
        if isinstance(item, str):
            _text("prompt", item, may_be_empty=True)
        elif not isinstance(item, list) or not all(
            type(token) is int and 0 <= token < 2**31 for token in item
        ):
            raise Refused(400, f"prompt must be {forms}", param="prompt")
    return prompt


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Messages whose content is one text each."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list that is not empty", param="messages")
    checked = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise Refused(400, f"{where} is {_kind(message)}; it must be an object", param=where)
        content, role = message.get("content"), message.get("role")
        _text(f"{where}.role", role)
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") != "text":
                    line = f"{where}.content has a part that is not text"
                    raise Refused(400, line, param=where)
                _text(f"{where}.content", part.get("text"))
            content = "".join(part["text"] for part in content)
        _text(f"{where}.content", content, may_be_empty=True)
        name = {"name": message["name"]} if message.get("name") is not None else {}
        if name:
            _text(f"{where}.name", name["name"])
        if others := sorted(message.keys() - {"role", "content", "name"}):
            shown = others[0][:80].encode(errors="replace").decode()
            raise Refused(400, f"{where} has the unknown field {shown!r}", param=where)
        checked.append({"role": role, "content": content, **name})
    return checked


def _encoded(model: ServedModel, text: str) -> list[int]:
    try:
        ids = encode(model.vocabulary, text)
    except CalmError as error:
        raise Refused(400, str(error), param="prompt") from None
    if not ids:
        raise Refused(400, "an empty prompt has no next token", param="prompt")
    return ids


def _decoded(model: ServedModel, ids: list[int]) -> str:
    """The text of ids, including those after an end token."""
    rows = model.vocabulary.size
    if unknown := [token for token in ids if token >= rows]:
        raise Refused(400, f"prompt token {unknown[0]} is outside the {rows} ids", param="prompt")
    ends = set(model.vocabulary.eos_ids)
    return model.vocabulary.decode([token for token in ids if token not in ends])


def _text(name: str, value: Any, *, may_be_empty: bool = False) -> None:
    if not isinstance(value, str) or not (value or may_be_empty):
        line = f"{name} is {_kind(value)}; it must be a text that is not empty"
        raise Refused(400, line, param=name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(400, f"{name} has half of a surrogate pair", param=name) from None


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        shown = value if type(value) in (int, float) else _kind(value)
        line = f"{name} is {str(shown)[:40]}; it must be an integer from {low} to {high}"
        raise Refused(400, line, param=name)


def _flag(given: Mapping[str, Any], name: str) -> bool:
    if not isinstance(given[name], bool):
        raise Refused(400, f"{name} is {_kind(given[name])}; it must be true or false", param=name)
    return given[name]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if value == "":
        return "an empty text"
    kinds = {bool: "a truth value", int: "a number", float: "a number", str: "a text"}
    return kinds.get(type(value), "a list" if isinstance(value, list) else "an object")
