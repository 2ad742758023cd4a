"""The folders that an experiment leaves, written without a training."""

import json

import numpy as np
from etils import epath

from calm_jax.evaluation import metric_table
from calm_jax.evaluation.results import predictions_file
from calm_jax.experiment.arms import jobs
from calm_jax.experiment.page import write_page


def scored(job, rights, metric="exact_match", texts=None, group=""):
    """Predictions and scores of a job by task, right where `rights[task]` [N] says.

    With `texts`, by whether they are right, these are the predictions. Tasks "GROUP/…" are rows of
    that group.
    """
    job.results.mkdir(parents=True, exist_ok=True)
    summary = {"_run": {"step": 1, "fingerprint": None, "date": "today"}}
    for task, right in rights.items():
        records = [
            {"inputs": f"q{n}", "targets": "the right one", "prediction": texts[bool(x)]}
            if texts
            else {
                "inputs": f"q{n}",
                "targets": "1",
                "prediction": "1" if x else "0",
                "correct": bool(x),
            }
            for n, x in enumerate(right)
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        predictions_file(job.results, task).write_text(lines)
        summary[task] = metric_table.score(records, (metric,))
        summary[task] |= {"group": group} if group and task.startswith(f"{group}/") else {}
    (job.results / "summary.json").write_text(json.dumps(summary))


def page_of(folder, experiment, rights, group="", also=lambda job: None):
    """The page's path; `rights` are those of each arm by task."""
    found = list(jobs(experiment, "f.py", epath.Path(folder), {}))
    for job in found:
        scored(job, rights[job.arm.name], group=group)
        (job.folder / "config.json").write_text("{}")
        also(job)
    path, _ = write_page(experiment, found, epath.Path(folder), "calm experiment")
    return path


def trained(job, *, steps, tokens_per_step, flops_per_step, speed, trees):
    """The files of a training; `trees` are (name, parameters, whether it is trained)."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "config.json").write_text("{}")
    costs = {
        "trees": [
            {"name": name, "parameters": parameters, "trained": is_trained}
            for name, parameters, is_trained in trees
        ],
        "tokens_per_step": tokens_per_step,
        "flops_per_step": flops_per_step,
        "memory_bytes": 1_000,
    }
    (job.folder / "costs.json").write_text(json.dumps(costs))
    lines = [
        {"step": step, "split": "train", "loss": 1.0, "tokens_per_second": speed}
        for step in sorted({1, steps // 2, steps})
    ]
    lines.append({"step": steps, "split": "validation", "loss": 1.0})
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def random_rights(seed, share, count=200):
    return np.random.default_rng(seed).random(count) < share
