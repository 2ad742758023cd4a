"""The pages in docs/ that are made from the code are those that it makes."""

import ast
import importlib.util
import pathlib
import re

from calm_jax.training.config_keys import flatten, to_dict
from calm_jax.training.configuration import composed_run, decoder_run

ROOT = pathlib.Path(__file__).parents[1]


def test_the_page_of_config_keys_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_config", ROOT / "docs/make_config.py")
    make_config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_config)
    assert (ROOT / "docs/config.md").read_text() == make_config.page(), make_config.__doc__


def test_the_page_of_config_keys_has_every_key_with_its_meaning():
    rows = dict(
        re.findall(r"^\| `(.*?)` \|.*\| (.*) \|$", (ROOT / "docs/config.md").read_text(), re.M)
    )
    keys = {**flatten(to_dict(decoder_run())), **flatten(to_dict(composed_run()))}
    assert keys.keys() - {"kind"} <= rows.keys()
    assert not [key for key, meaning in rows.items() if len(meaning) < 3]


def test_links_between_pages_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    ]
    assert links
    assert not [f"{page}: {link}" for page, link in links if not (page.parent / link).exists()]


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code():
    constants = "\n".join(
        node.value
        for path in (ROOT / "calm_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    page = (ROOT / "docs/troubleshooting.md").read_text()
    cells = re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE)
    messages = [message for cell in cells for message in re.findall("`(.*?)`", cell)]
    fragments = [part.strip() for message in messages for part in message.split("…")]
    assert len(messages) > 30
    assert not [part for part in fragments if part and part not in constants]
