"""Runs a benchmark as a user would: a process of its own, at the smallest size."""

import json
import pathlib
import subprocess
import sys

import pytest
from child_processes import environment

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run_benchmark(tmp_path):
    """`run_benchmark("step", *flags)`: the rows of its JSON."""

    def run(name: str, *flags: str, size: str = "--size=tiny") -> list[dict]:
        flags = [size, *flags] if size else flags
        output = tmp_path / f"{name}.json"
        done = subprocess.run(
            [sys.executable, FOLDER / f"{name}.py", f"--output={output}", *flags],
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        told = json.loads(output.read_text())
        assert told["benchmark"] == name
        return told["rows"]

    return run
