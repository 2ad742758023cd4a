"""The tutorial: what is stored in it is whole, and running it shows what it promises."""

import ast
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

NOTEBOOK = pathlib.Path(__file__).parents[1] / "docs/tutorial.ipynb"
MISSING = [m for m in ("ipykernel", "matplotlib", "nbclient") if not importlib.util.find_spec(m)]

# Runs the notebook with a last cell that tells its scores; other options of XLA than the tests'.
RUN = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
notebook.cells.append(nbformat.v4.new_code_cell("print(json.dumps(scores))"))
nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
print(notebook.cells[-1].outputs[0].text)
"""


def code_cells() -> list[dict]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_its_code_compiles_and_what_it_imports_is_there():
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in code_cells()))
    for node in ast.walk(tree):
        names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert not [name for name in names if not hasattr(module, name)], node.module
        elif isinstance(node, ast.Import):
            there = [name for name in names if name.partition(".")[0] not in MISSING]
            assert all(map(importlib.util.find_spec, there)), there
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "calm_jax":
            assert hasattr(importlib.import_module("calm_jax"), node.attr), node.attr


def test_it_is_stored_as_one_run_left_it():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert NOTEBOOK.stat().st_size < 500_000


@pytest.mark.slow
def test_the_pair_does_what_neither_part_does(tmp_path):
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} not installed: pip install '.[docs]'")
    own = {name: str(tmp_path / name) for name in ("TMPDIR", "CALM_CACHE", "IPYTHONDIR")}
    (tmp_path / "TMPDIR").mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", RUN, NOTEBOOK],
        env=os.environ | own | {"PYTHONPATH": str(NOTEBOOK.parents[1]), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    scores = json.loads(ran.stdout)
    math = {name: row["math"] for name, row in scores.items()}
    assert max(math["augment alone"], math["anchor alone"], math["with a stranger"]) < 15
    assert math["pair"] > 70
    assert scores["augment alone"]["subs"] > 80 and scores["anchor alone"]["num"] > 80
