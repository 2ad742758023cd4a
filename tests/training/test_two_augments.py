"""Two augments, each of which knows one half of the keys: the anchor reads both."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 200  # expressions of each set; 95 % of them lie within 7 points at 50 %, 4 at 90 %


def calm(folder: Path, *arguments: str) -> None:
    """One command in a process of its own: on the device that a person has, not on eight."""
    environment = {
        **os.environ,
        "CALM_CACHE": str(folder / "cache"),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
    }
    ended = subprocess.run(
        [sys.executable, "-m", "calm_jax", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Percent of right answers by run and set, of five runs trained from nothing."""
    folder = tmp_path_factory.mktemp("two")
    anchor = f"--config.anchor={folder / 'anchor' / 'frozen'}"
    first, second = (str(folder / name / "frozen") for name in ("first", "second"))

    def run(name: str, sets: str, *changes: str) -> dict[str, float]:
        workdir = f"--workdir={folder / name}"
        config = f"--config=configs/kv_two_augments.py:{name}"
        tasks = tuple(f"calm_jax/key_value/demo/{of}" for of in sets.split())
        calm(folder, "train", config, workdir, "--config.train.tensorboard=False", *changes)
        scored = (f"--config.evaluate.limit={LIMIT}", f"--config.evaluate.tasks={tasks}")
        calm(folder, "evaluate", workdir, *scored)
        summary = json.loads((folder / name / "evaluation" / "summary.json").read_text())
        return {
            of: summary[task]["exact_match"] for of, task in zip(sets.split(), tasks, strict=True)
        }

    parent = "subs_first subs_second num math"
    of_both = f"{parent} subs math_first math_second"
    few_steps = "--config.train.num_steps=400"
    found = {}
    with ThreadPoolExecutor(2) as pool:
        for runs in (
            {"anchor": (parent,), "first": (parent,), "second": (parent,)},
            {
                "compose": (of_both, anchor, f"--config.augments={(first, second)}"),
                "alone": (parent, anchor, f"--config.augments={(first,)}", few_steps),
            },
        ):
            waiting = {name: pool.submit(run, name, *changes) for name, changes in runs.items()}
            found |= {name: future.result() for name, future in waiting.items()}
    print(json.dumps(found, indent=2))
    return found


@pytest.mark.slow
def test_each_augment_knows_its_half_alone_and_the_anchor_none(scores):
    first, second, anchor = (scores[name] for name in ("first", "second", "anchor"))
    assert first["subs_first"] > 95 > 5 > first["subs_second"]
    assert second["subs_second"] > 95 > 5 > second["subs_first"]
    assert anchor["num"] > 80 > 5 > max(anchor["subs_first"], anchor["subs_second"])
    assert max(first["math"], second["math"], anchor["math"]) < 15


@pytest.mark.slow
def test_with_one_augment_the_other_half_stays_unknown(scores):
    assert scores["alone"]["subs_first"] > 70
    assert scores["alone"]["subs_second"] < 5


@pytest.mark.slow
def test_with_both_the_anchor_reads_both_halves(scores):
    """All keys asked for are among those that the bridge's training did not have."""
    composed = scores["compose"]
    assert min(composed[name] for name in ("subs_first", "subs_second", "subs")) > 80
    assert min(composed[name] for name in ("math_first", "math_second", "math")) > 45
    assert composed["num"] > 80
