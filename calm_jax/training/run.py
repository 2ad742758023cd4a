"""A run's folder: started once, resumed until it is finished, and never mixed with another run."""

import math
import shlex
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from calm_jax.checkpoints.files import absolute, check_writable, read_json, storage, write_json
from calm_jax.checkpoints.kinds import kind_of
from calm_jax.checkpoints.training import TrainingCheckpoints
from calm_jax.data.entries import files_of
from calm_jax.errors import CalmError
from calm_jax.training import config_keys, configuration


def check_run(
    workdir: epath.PathLike, config: ConfigDict, *, overwrite: bool = False
) -> epath.Path:
    """The absolute path of a folder in which a run of this config may start or continue.

    Keys of `configuration.MAY_CHANGE` may differ from those it was started with. Writes nothing.

    Raises:
        CalmError: the folder cannot be written, holds something else, or was started with another
            config. The message names every key that differs, with both values.
    """
    folder = absolute(workdir)
    path = folder / "config.json"
    with storage("write", folder):
        if path.exists():
            old = _read_config(path)
            if not overwrite:
                _check_same(old, config_keys.to_dict(config), folder)
        elif folder.exists() and any(not x.name.startswith(".") for x in folder.iterdir()):
            raise CalmError(f"{folder} is neither empty nor a run: it has no config.json")
    for path in _paths(config) if overwrite else ():
        if folder in (absolute(path), *absolute(path).parents):
            raise CalmError(f"--overwrite would remove {path} with the run {folder}")
    check_writable(folder)
    return folder


def _paths(config: ConfigDict) -> Iterator[str]:
    """The folders and files that a config names."""
    yield from filter(None, (config.get("anchor"), *config.get("augments", ())))
    if config.vocabulary and absolute(config.vocabulary).exists():  # not "bytes"
        yield config.vocabulary
    if config.kind == "decoder" and config.decoder["from"]:
        yield config.decoder["from"]
    yield from filter(None, map(files_of, (*config.data.train, *config.data.validation)))


def start_run(
    folder: epath.Path, config: ConfigDict, *, overwrite: bool = False, command: str = ""
) -> None:
    """Creates a checked run's folder and writes its config; `overwrite` removes an earlier run.

    `command` is appended to commands.json, which lists all command lines that trained the run.
    Raises `CalmError` if the folder cannot be written.
    """
    with storage("write", folder):
        if overwrite and (folder / "config.json").exists():
            folder.rmtree()
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_keys.to_dict(config))
    path = folder / "commands.json"
    commands = read_json(path, "a run")["commands"] if path.exists() else []
    if command and command not in commands[-1:]:
        write_json(path, {"commands": [*commands, command]})


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


def _read_config(path: epath.Path) -> dict[str, Any]:
    """The config in a run's folder. Refuses other folders, since `overwrite` would remove them."""
    values = read_json(path, "a run")
    if not {"kind", "train"} <= values.keys():
        raise CalmError(f"{path.parent} is not a run but {kind_of(values)}")
    return values


def _check_same(old: dict[str, Any], new: dict[str, Any], folder: epath.Path) -> None:
    differences = configuration.differences(old, new)
    if differences:
        listed = "; ".join(
            f"{key} was {was!r}, now {now!r}" for key, (was, now) in differences.items()
        )
        raise CalmError(
            f"{folder} was started with another config: {listed}. Restore the old values to "
            "continue it, give another --workdir, or give --overwrite to start again"
        )
