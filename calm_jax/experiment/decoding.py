"""How fast the models of an experiment decode: all in turns, in one process."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from calm_jax.checkpoints.any_model import load_model
from calm_jax.checkpoints.files import write_json
from calm_jax.decoding import Generator, Sampling, steps
from calm_jax.evaluation.results import SCORED, read_optional
from calm_jax.experiment.arms import Job

FILE = "costs.json"  # in the experiment's folder
PROMPT, NEW = 16, 64  # tokens
ROWS = (1, 8)  # that are decoded at once
_ROUNDS = 3  # in each of which every model is loaded, so that one alone needs to fit
_LEAST_SECONDS = 1.0  # of answers in a round, in which a fast model answers often
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
    turns = _ROUNDS * len(models)
    with tqdm(total=turns, desc=f"decoding of {len(models)} models", unit="turn") as progress:
        for _ in range(_ROUNDS):
            for name, folder in models.items():
                progress.set_postfix_str(name)
                model = load_model(folder)
                for rows in ROWS:
                    seconds[name][rows] += _timed(model, rows)
                progress.update()
    return {
        name: {str(rows): statistics.median(times) for rows, times in of_model.items()}
        for name, of_model in seconds.items()
    }


def _timed(model: Any, rows: int) -> list[float]:
    """Seconds of answers of `rows` rows in which nothing was compiled."""
    generator = Generator(model, max_length=PROMPT + NEW, slots=rows, eos_ids=())
    prompts = np.random.default_rng(0).integers(1, generator.scheduler.known, (rows, PROMPT))
    found, warm_ups = [], 0
    while sum(found) < _LEAST_SECONDS:
        before, start = _programs(), time.perf_counter()
        generator.generate(prompts.tolist(), Sampling(max_new_tokens=NEW))
        taken = time.perf_counter() - start
        if _programs() == before or warm_ups == _MOST_WARM_UPS:
            found.append(taken)
        else:
            warm_ups += 1
    return found


def _programs() -> int:
    return steps.prefill._cache_size() + steps.decode._cache_size()


def _scored(job: Job) -> dict[str, Any]:
    """When the job's model was scored, and which checkpoint."""
    scored = read_optional(job.results / "summary.json").get(SCORED, {})
    return {key: scored.get(key) for key in ("step", "fingerprint", "date")}
