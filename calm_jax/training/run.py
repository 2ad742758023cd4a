"""A run's folder: started once, then resumed, and never mixed with another run."""

from typing import Any

from etils import epath
from ml_collections import ConfigDict

from calm_jax.checkpoints.files import absolute, check_writable, read_json, storage, write_json
from calm_jax.checkpoints.kinds import kind_of
from calm_jax.errors import CalmError
from calm_jax.training import config_keys, configuration


def check_run(
    workdir: epath.PathLike, config: ConfigDict, *, overwrite: bool = False
) -> epath.Path:
    """Checks that a run of this config may start or continue in a folder; writes nothing.

    Keys of `configuration.MAY_CHANGE` may differ from those it was started with.

    Returns:
        the folder as an absolute path.

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
    for model in (config.get("anchor"), *config.get("augments", ())):
        if overwrite and model and folder in (absolute(model), *absolute(model).parents):
            raise CalmError(f"--overwrite would remove {model} with the run {folder}")
    check_writable(folder)
    return folder


def start_run(
    folder: epath.Path, config: ConfigDict, *, overwrite: bool = False, command: str = ""
) -> None:
    """Creates a checked run's folder and writes its config; `overwrite` removes an earlier run.

    `command` is appended to commands.json, which lists all command lines that trained the run.

    Raises:
        CalmError: the folder cannot be written.
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
