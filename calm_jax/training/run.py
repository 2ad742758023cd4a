"""A run's directory: started once, resumed ever after, and never mixed with another run."""

from typing import Any

from etils import epath
from ml_collections import ConfigDict

from calm_jax.checkpoints.files import absolute, read_json, write_json
from calm_jax.errors import CalmError
from calm_jax.training import configuration


def open_run(workdir: epath.PathLike, config: ConfigDict, *, overwrite: bool = False) -> epath.Path:
    """Makes a run's directory, or checks that an existing one was started with the same config.

    Mesh, number of steps, logging and saving may differ. The config on disk becomes the new one.

    Raises:
        CalmError: the directory holds something else, was started with another config (every
        differing
            key is named with both values), or cannot be written.
    """
    folder = absolute(workdir)
    path = folder / "config.json"
    old = _read_config(path) if path.exists() else None
    try:
        if overwrite and old is not None:
            folder.rmtree()
            old = None
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        raise CalmError(f"cannot write {folder}: {error.strerror or error}") from error
    new = configuration.to_dict(config)
    if old is not None:
        _check_same(old, new, folder)
    elif not empty:
        raise CalmError(f"{folder} is neither empty nor a run: it has no config.json")
    write_json(path, new)
    return folder


def _read_config(path: epath.Path) -> dict[str, Any]:
    """A run's config, and not another tool's: `overwrite` removes what this returns for."""
    values = read_json(path, "a run")
    if not {"kind", "train"} <= values.keys():
        raise CalmError(f"{path.parent} is not a run: its config.json is of something else")
    return values


def _check_same(old: dict[str, Any], new: dict[str, Any], folder: epath.Path) -> None:
    differences = configuration.differences(old, new)
    if differences:
        listed = "; ".join(
            f"{key} was {was!r}, now {now!r}" for key, (was, now) in differences.items()
        )
        raise CalmError(
            f"{folder} was started with another config: {listed}. Use --overwrite, or another "
            "--workdir"
        )
