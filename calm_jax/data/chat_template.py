"""Chat templates: the Jinja source that a published model comes with, run as transformers runs it.

A template is untrusted code: it runs in Jinja's sandbox, with the names and filters that
transformers gives to templates.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from calm_jax.errors import CalmError


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool,
    where: str,
    arguments: Mapping[str, Any],
) -> str:
    """The text of a chat, as `apply_chat_template` of transformers makes it (`Vocabulary.chat`).

    Args:
        template: Jinja source.
        messages: fields that are None count as absent.
        special_tokens: names such as "bos_token" with their texts.
        where: the name of the template in error messages.

    Raises:
        CalmError: there are no messages, or the template is not Jinja or refuses them.
    """
    if not messages:
        raise CalmError("the chat has no messages")
    messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
    compiled = compile_template(template, where)
    try:
        return compiled.render(
            {
                "tools": None,
                "documents": None,
                **special_tokens,
                **arguments,
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
            }
        )
    except Exception as error:  # a template can raise anything
        raise CalmError(f"chat template of {where}: {_line(error)}") from error


@functools.lru_cache
def compile_template(template: str, where: str) -> jinja2.Template:
    """Raises `CalmError` if the source is not Jinja."""
    try:
        return _environment().from_string(template)
    except jinja2.TemplateError as error:
        raise CalmError(f"chat template of {where}: {_line(error)}") from error


class _Generation(jinja2.ext.Extension):
    """Drops the tags `{% generation %}…{% endgeneration %}`, but keeps the text between them."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own `tojson` escapes characters for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _line(error: Exception) -> str:
    return " ".join(f"{error}".split()) or type(error).__name__
