"""The site of the documentation builds without a warning, and shows what it should."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

import calm_jax

ROOT = pathlib.Path(__file__).parents[1]
NEEDED = ("sphinx", "myst_nb", "furo", "sphinx_external_toc", "sphinx_copybutton")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built as `launch/docs.sh` does."""
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = re.search(r"^\.venv/bin/python (-m sphinx .*) build/site$", script(), re.MULTILINE)[1]
    built = subprocess.run(
        [sys.executable, *command.split(), folder], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder


def script() -> str:
    return (ROOT / "launch/docs.sh").read_text()


def test_warnings_are_errors(site):
    assert "--fail-on-warning" in script()
    assert (site / "index.html").read_text() == (site / "README.html").read_text()


def test_every_public_name_has_its_docstring(site):
    page = (site / "docs/reference.html").read_text()
    for name in calm_jax.__all__:
        found = re.search(rf'<dt[^>]* id="calm_jax\.{name}">.*?</dt>\s*<dd><p>', page, re.DOTALL)
        assert found, name


def test_the_tutorial_shows_its_picture(site):
    page = (site / "docs/tutorial.html").read_text()
    assert re.search(r'<img [^>]*src="\.\./_images/\w+\.png"', page)


def test_every_page_fits_the_screen_and_needs_no_network(site, browser):
    with browser.page() as page:
        for path in [*site.glob("*.html"), *site.glob("docs/**/*.html")]:
            page.open(path.as_uri())
            for width in (1280, 400):
                page.resize(width)
                sizes = "[document.documentElement.scrollWidth, window.innerWidth]"
                needed, there = page.value(sizes)
                assert needed <= there, f"{path} at {width}"
        assert not page.errors()
        assert not [url for url in page.requests() if not url.startswith(("file:", "data:"))]


def test_the_search_finds_a_function(site, browser):
    with browser.page() as page:
        page.open((site / "search.html").as_uri() + "?q=export_bridge")
        page.wait("document.querySelector('#search-results a[href*=\"reference.html\"]')")
