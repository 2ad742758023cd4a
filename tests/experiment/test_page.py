"""What the page of an experiment shows, from folders that were written without a training."""

import re

import numpy as np
from etils import epath
from made_runs import random_rights, scored

from calm_jax.experiment.arms import Arm, Experiment, jobs
from calm_jax.experiment.page import write_page

PAIR = {"anchor": "anchor", "augments": ("anchor",)}


def page(folder, experiment, rights):
    """The page's text; `rights` are those of each arm by task."""
    found = list(jobs(experiment, "f.py", epath.Path(folder), {}))
    for job in found:
        scored(job, rights[job.arm.name])
        (job.folder / "config.json").write_text("{}")
    path, _ = write_page(experiment, found, epath.Path(folder), "calm experiment")
    return path.read_text()


def test_a_curve_has_a_line_a_task_in_its_interval(tmp_path):
    shares = {"few": 2, "some": 20, "most": 50}
    arms = [Arm(name, x=x, **PAIR) for name, x in shares.items()]
    experiment = Experiment(
        "t", (Arm("anchor", kind="part"), *arms), ("math", "subs"), "some", axis="percent of keys"
    )
    rights = {"anchor": {task: random_rights(0, 0.5) for task in ("math", "subs")}}
    for name, share in shares.items():
        right = np.arange(200) < 2 * share  # exactly that many percent
        rights[name] = {"math": right, "subs": ~right}
    text = page(tmp_path, experiment, rights)
    (svg,) = re.findall(
        r'<svg role="img" aria-label="exact_match over percent of keys".*?</svg>', text, re.S
    )
    assert "percent of keys</text>" in svg
    lines = re.findall(r'<polyline class="dots" points="(.*?)"', svg)
    assert len(lines) == len(re.findall("<polygon", svg)) == 2
    heights = [[float(point.split(",")[1]) for point in line.split()] for line in lines]
    for line, shown in zip(heights, ([2, 20, 50], [98, 80, 50]), strict=True):
        # 0 % is at 180, 100 % at 12.
        np.testing.assert_allclose(line, [180 - 1.68 * value for value in shown], atol=0.1)
