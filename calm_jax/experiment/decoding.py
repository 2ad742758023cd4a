"""How fast the models of an experiment decode: all in turns, in one process."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from calm_jax.checkpoints.any_model import load_model
from calm_jax.checkpoints.files import write_json
from calm_jax.decoding import Generator, Sampling, steps
from calm_jax.evaluation.results import SCORED, read_optional
from calm_jax.experiment.arms import Job

FILE = "costs.json"  # in the experiment's folder
PROMPT, NEW = 16, 64  # tokens
ROWS = (1, 8)  # that are decoded at once
_ROUNDS = 3  # in each of which every model is loaded, so that one alone needs to fit
_REPEATED = 3  # times in a round
_MOST_WARM_UPS = 6


def measure(jobs: Sequence[Job], folder: epath.Path) -> None:
    """Measures the models that were scored, and writes `costs.json` into the experiment's folder.

    An arm that only scores a model in another way has none. Nothing is measured if the file is of
    the same models already.

    Raises:
        CalmError: a model that cannot be loaded, or the file cannot be read or written.
    """
    models = {
        job.arm.name: job for job in reversed(jobs) if not job.arm.scored_from and job.is_scored
    }
    models = dict(reversed(models.items()))  # the first seed of each arm, in order
    # What is scored anew is another model, or may be.
    of = {name: [job.model, _scored(job)] for name, job in models.items()}
    before = read_optional(folder / FILE).get("decoding", {})
    if not models or before.get("of") == of:
        return
    print(f"decoding with {len(models)} models in turns")
    times = decode_times({name: job.model for name, job in models.items()})
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    write_json(folder / FILE, {"decoding": {"of": of, "device": device, "seconds": times}})


def measured(folder: epath.Path) -> dict[str, Any]:
    """What was measured: "device", and "seconds" of an answer by arm and number of rows."""
    return read_optional(folder / FILE).get("decoding", {"device": "", "seconds": {}})


def decode_times(models: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Seconds in which each model answers with `NEW` tokens, by the number of rows; medians.

    `models` are folders by name. They take turns, so that all meet the same other load.
    """
    seconds = {name: {rows: [] for rows in ROWS} for name in models}
    for _ in range(_ROUNDS):
        for name, folder in models.items():
            model = load_model(folder)
            for rows in ROWS:
                seconds[name][rows] += _timed(model, rows)
    return {
        name: {str(rows): statistics.median(times) for rows, times in of_model.items()}
        for name, of_model in seconds.items()
    }


def _timed(model: Any, rows: int) -> list[float]:
    """Seconds of several answers of `rows` rows, once nothing compiles any more."""
    generator = Generator(model, max_length=PROMPT + NEW, slots=rows, eos_ids=())
    prompts = np.random.default_rng(0).integers(1, generator.scheduler.known, (rows, PROMPT))
    found = []
    for _ in range(_MOST_WARM_UPS):
        before = _programs()
        generator.generate(prompts.tolist(), Sampling(max_new_tokens=NEW))
        if _programs() == before:
            break
    for _ in range(_REPEATED):
        start = time.perf_counter()
        generator.generate(prompts.tolist(), Sampling(max_new_tokens=NEW))
        found.append(time.perf_counter() - start)
    return found


def _programs() -> int:
    return steps.prefill._cache_size() + steps.decode._cache_size()


def _scored(job: Job) -> dict[str, Any]:
    """When the job's model was scored, and which checkpoint."""
    scored = read_optional(job.results / "summary.json").get(SCORED, {})
    return {key: scored.get(key) for key in ("step", "fingerprint", "date")}
