"""Writes docs/config.md from the comments of the code that defines the keys of a config.

python docs/make_config.py
"""

import ast
import inspect
import pathlib
import textwrap
from collections.abc import Callable, Iterator

from calm_jax.models.config import CompositionConfig, DecoderConfig
from calm_jax.training import configuration

PAGE = pathlib.Path(__file__).with_name("config.md")
HEAD = """\
# Keys of a config

A config is a Python file whose `get_config()` returns `decoder_run(…)` or `composed_run(…)` of
`calm_jax.training.configuration`, with some keys changed; `--config.KEY=VALUE` sets one on the
command line. `calm train --config=FILE --help` lists the values of one file. An unknown key, or a
value of another type or out of range, ends the command before anything is loaded.

A run that is continued may change {may_change}; everything else must be as it was.

This page is made from the comments in the code by `python docs/make_config.py`.
"""


def page() -> str:
    """The text of docs/config.md."""
    may_change = ", ".join(f"`{key}`" for key in configuration.MAY_CHANGE)
    parts = [
        "\n".join(textwrap.wrap(paragraph, 100, break_long_words=False, break_on_hyphens=False))
        for paragraph in HEAD.format(may_change=may_change).split("\n\n")
    ]
    parts += [
        "## Of every run",
        _table(_of_function(configuration._common)),
        "## Of a run that trains one decoder",
        _table(_of_function(configuration.decoder_run), _of_class(DecoderConfig, "decoder")),
        "## Of a run that trains a bridge",
        _table(
            _of_function(configuration.composed_run), _of_class(CompositionConfig, "composition")
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _table(*sources: Iterator[tuple[str, str, str]]) -> str:
    rows = [row for source in sources for row in source]
    cells = [
        (f"`{key}`", f"`{default}`" if default else "", meaning.replace("|", r"\|"))
        for key, default, meaning in rows
    ]
    lines = [("key", "default", "meaning"), ("---", "---", "---"), *cells]
    return "\n".join(f"| {' | '.join(line)} |".replace("  ", " ") for line in lines)


def _of_function(function: Callable) -> Iterator[tuple[str, str, str]]:
    """Key, default and meaning of every key that a function sets to a constant or leaves open."""
    for lines, node in _statements(function):
        if not isinstance(node, ast.Assign):
            continue
        key = ast.unparse(node.targets[0]).removeprefix("config.").replace("['from']", ".from")
        meaning = _comment(lines, node)
        if ast.unparse(node.value) == "ConfigDict()":
            if meaning:
                yield key, "", meaning
        elif ast.unparse(node.value).startswith("placeholder("):
            yield key, "None", meaning
        elif _is_constant(node.value):
            yield key, ast.get_source_segment("\n".join(lines), node.value), meaning


def _of_class(cls: type, section: str) -> Iterator[tuple[str, str, str]]:
    """Key, default and meaning of every field of a dataclass."""
    for lines, node in _statements(cls):
        if isinstance(node, ast.AnnAssign):
            source = "\n".join(lines)
            default = ast.get_source_segment(source, node.value) if node.value else "required"
            choices = [
                ast.unparse(each.slice).strip("()").replace("'", '"')
                for each in ast.walk(node.annotation)
                if isinstance(each, ast.Subscript) and ast.unparse(each.value) == "Literal"
            ]
            meaning = "; ".join(filter(None, [*choices, _comment(lines, node)]))
            yield f"{section}.{node.target.id}", default, meaning


def _statements(code: type | Callable) -> Iterator[tuple[list[str], ast.stmt]]:
    source = textwrap.dedent(inspect.getsource(code))
    for node in ast.parse(source).body[0].body:
        yield source.splitlines(), node


def _is_constant(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def _comment(lines: list[str], node: ast.stmt) -> str:
    """The comment above a statement, and the one at its end."""
    first = node.lineno - 1
    while lines[first - 1].lstrip().startswith("#"):
        first -= 1
    found = [line.strip().lstrip("# ") for line in lines[first : node.lineno - 1]]
    _, mark, trailing = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")
    return " ".join([*found, trailing.strip()] if mark else found)


if __name__ == "__main__":
    PAGE.write_text(page())
