"""The page's templates, with the filters and colours that they use.

Every text that a template writes is escaped, and its control characters are made visible.
"""

import pathlib
import re
import zlib
from typing import Any

import jinja2

from calm_jax import units
from calm_jax.evaluation.results import Run
from calm_jax.evaluation.table1 import interval, percent


def run_colour(run: Run) -> str:
    """The CSS colour of a run: that of its role if it has one, else one of six by its name."""
    if run.composed or run.name in ("augment", "anchor"):
        return f"var(--{'composed' if run.composed else run.name})"
    role = re.search(r": (anchor|augment)( \d+)? alone$", run.name)
    return f"var(--{role[1] if role else f'other-{zlib.crc32(run.name.encode()) % 6}'})"


def shade(index: int, count: int) -> str:
    """One of `count` CSS colours from green over blue to amber."""
    at = 0.0 if count < 2 else 2 * index / (count - 1)
    first, second = ("composed", "anchor") if at <= 1 else ("anchor", "augment")
    share = round(100 * (at if at <= 1 else at - 1))
    return f"color-mix(in oklab, var(--{first}), var(--{second}) {share}%)"


def share(part: float) -> str:
    """A part of 1 in percent, with two or three significant digits."""
    return f"{100 * part:,.0f} %" if part >= 0.995 else f"{100 * part:.2g} %"


def visible(text: str) -> str:
    """The text with line breaks and control characters written out."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def cut(text: str, length: int) -> str:
    """The visible text in at most so many characters, an ellipsis included."""
    text = visible(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _finalize(value: Any) -> Any:
    """Text made visible; what a macro has written (it has `__html__`) is left as it is."""
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    return visible(value) if is_text else value


def environment() -> jinja2.Environment:
    """The templates of this package with their filters."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    found.filters |= {
        "cut": cut,
        "flops": units.flops,
        "grouped": lambda number: f"{number:,}",
        "interval": interval,
        "percent": percent,
        "share": share,
        "digits": lambda number: f"{number:.4g}",
        "size": units.size,
    }
    return found
