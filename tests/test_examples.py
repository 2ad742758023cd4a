"""Examples run, and show what they promise."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "examples/digits.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_sums_with_digits(tmp_path):
    """At half of its size the pair does what neither part does."""
    pytest.importorskip("sklearn")
    table = tmp_path / "table.json"
    ended = run("--anchor_steps=1000", "--bridge_steps=400", f"--output={table}")
    assert ended.returncode == 0, ended.stderr
    assert "composed, other images" in ended.stdout and "bridge   step   400 of 400" in ended.stdout
    rows = json.loads(table.read_text())
    column = {name: row["image + number"] for name, row in rows.items()}
    for other in ("anchor alone", "augment alone", "composed, other images"):
        assert column["composed"]["low"] > column[other]["high"] + 20
    assert rows["anchor alone"]["digit + number"]["percent"] > 60
