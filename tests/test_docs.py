"""What the documentation says of the code is true."""

import ast
import importlib.util
import json
import os
import pathlib
import pkgutil
import re
import shutil
import subprocess
import sys

import feature_encoders
import numpy as np
import pytest
import tiny_models
import yaml
from flax import nnx

import calm_jax
import calm_jax.data
import calm_jax.decoding
import calm_jax.models
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.evaluation.metric_table import METRICS
from calm_jax.evaluation.tasks.prompts import TEMPLATES
from calm_jax.evaluation.tasks.registry import FAMILIES
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


def pages() -> list[pathlib.Path]:
    """The files that are pages of the site, and of the documentation on GitHub."""
    found = [*ROOT.glob("*.md"), ROOT / "benchmarks/README.md"]
    return found + [p for end in ("md", "ipynb") for p in sorted(ROOT.glob(f"docs/**/*.{end}"))]


def prose(page: pathlib.Path) -> str:
    """The Markdown of a page or notebook, without its code blocks."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: pathlib.Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def test_links_between_pages_lead_somewhere():
    links = [
        (page, *link)
        for page in pages()
        for link in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", prose(page))
    ]
    assert len(links) > 80
    for page, link, anchor in links:
        target = (page.parent / link).resolve() if link else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}#{anchor}"


def test_every_page_is_in_the_navigation_once():
    def listed(entries):
        for entry in entries:
            yield entry["file"]
            yield from listed(entry.get("entries", ()))

    toc = yaml.safe_load((ROOT / "docs/_toc.yml").read_text())
    found = [toc["root"], *listed(each for tree in toc["subtrees"] for each in tree["entries"])]
    assert sorted(found) == sorted(str(p.relative_to(ROOT).with_suffix("")) for p in pages())


def test_the_map_in_the_readme_has_every_page():
    inside = [page for page in pages() if page.parent == ROOT / "docs"]
    readme = (ROOT / "README.md").read_text()
    assert not [page for page in inside if f"](docs/{page.name})" not in readme]


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs/reference.md").read_text()
    listed = re.findall(r"^\.\. auto\w+:: ([\w.]+)", page, re.MULTILINE)
    assert len(listed) == len(set(listed))
    described = list(map(pkgutil.resolve_name, listed))
    for module in (calm_jax, calm_jax.data, calm_jax.decoding, calm_jax.models):
        missing = [name for name in module.__all__ if getattr(module, name) not in described]
        assert not missing, module.__name__


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


def test_the_page_of_tasks_has_every_task_prompt_and_metric():
    page = (ROOT / "docs/tasks.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert set(FAMILIES) <= set(rows)
    for template in TEMPLATES.values():
        assert template.question.replace("\n", "⏎") in page
        assert all(f"`{text}`".replace("\n", "⏎") in page for text in template.stop)
    assert all(f"`{name}`" in page for name in METRICS)


def test_the_code_of_senses_runs(tmp_path, monkeypatch):
    """With tiny models in the place of those that it names."""
    image = pytest.importorskip("PIL.Image")
    page = (ROOT / "docs/senses.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    anchor = tiny_models.decoder(vocab_size=264)
    anchor.vocabulary = load_vocabulary("bytes")
    encoder = feature_encoders.Encoder(nnx.Rngs(1))
    encoder.depth = 4  # all of its layers are alike
    known = {
        "anchor": anchor,
        "calm_jax": calm_jax,
        "encoder": encoder,
        "images": feature_encoders.random_items(0, 2),
        "rngs": nnx.Rngs(2),
    }
    monkeypatch.chdir(tmp_path)
    exec(blocks[0], known)
    assert len(known["answers"]) == 2
    calm_jax.save_frozen(anchor, "models/anchor")
    shutil.copytree(ROOT / "tests/checkpoints/convert/golden/vit", "vit")
    for seed, name in enumerate(("cat.png", "dog.png")):
        pixels = np.random.default_rng(seed).integers(256, size=(20, 30, 3)).astype(np.uint8)
        image.fromarray(pixels).save(name)
    exec("".join(blocks[1:]), known)
    assert known["metrics"]["loss"] < 0.9 * np.log(264)
    assert all(len(answer.tokens) > 0 for (answer,) in known["found"])


@pytest.mark.slow
def test_the_steps_of_own_pair_give_what_they_show(tmp_path):
    page = (ROOT / "docs/own_pair.md").read_text()
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    script = [
        "set -e",
        f'python() {{ "{sys.executable}" "$@"; }}',
        'calm() { python -m calm_jax "$@"; }',
        *(text if kind == "bash" else f"python - <<'END'\n{text}END" for kind, text in blocks),
    ]
    for name in ("configs", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    run = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CALM_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "bridge        147,840   578 KiB  trained" in run.stdout
    assert "validation.jsonl: 100.0% of 5" in run.stdout
    assert "validation.jsonl, anchor alone: 0.0% of 5" in run.stdout
    assert "What colour is a rose? red" in run.stdout
    assert "Which colour has a lemon? yellow" in run.stdout
    assert (tmp_path / "runs/report.html").exists()
