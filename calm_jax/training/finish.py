"""Whether a run is finished, and the closing lines it then prints."""

import math
import shlex

from etils import epath
from ml_collections import ConfigDict

from calm_jax.checkpoints.files import read_json
from calm_jax.checkpoints.training import TrainingCheckpoints


def is_finished(run: epath.Path, config: ConfigDict, checkpoints: TrainingCheckpoints) -> bool:
    """Whether all steps are saved and a decoder's best checkpoint is a frozen folder."""
    latest = checkpoints.latest
    if latest is None or latest < config.train.num_steps:
        return False
    return config.kind != "decoder" or frozen_step(run) == checkpoints.best


def frozen_step(run: epath.Path) -> int | None:
    """The step that a decoder run's frozen folder holds; None without a complete folder."""
    path = run / "frozen_step.json"
    is_whole = path.exists() and (run / "frozen").exists()
    return read_json(path, "a run")["step"] if is_whole else None


def closing_lines(run: epath.Path, config: ConfigDict, checkpoints: TrainingCheckpoints) -> str:
    """The best step of a finished run, its score, where it is, and the command to run next."""
    best, loss = checkpoints.best, checkpoints.best_loss
    score = f"validation loss {loss:.4g}" if math.isfinite(loss) else "the last; none was validated"
    folder = run / "frozen" if config.kind == "decoder" else run / "checkpoints" / str(best)
    workdir = f"--workdir={shlex.quote(str(run))}"
    if config.evaluate.tasks or any("jsonl" in entry for entry in config.data.validation):
        parts = "" if config.kind == "decoder" else " --parts"
        command = f"calm evaluate {workdir}{parts}"
    else:
        command = f"calm generate {workdir} --prompt=…"
    return (
        f"{run} has finished {checkpoints.latest:,} steps; the best is step {best:,} ({score}), in "
        f"{folder}\nnext: {command}"
    )
