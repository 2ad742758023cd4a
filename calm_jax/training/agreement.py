"""What the processes of a run must agree on before it starts."""

import hashlib
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

import calm_jax
from calm_jax.checkpoints.files import absolute
from calm_jax.data.dataset import Dataset
from calm_jax.errors import CalmError
from calm_jax.training import config_keys
from calm_jax.training.run_model import Described

# The longest time that a network file system may take to show another machine's file.
VISIBLE_SECONDS = 60

# Keys that may differ: they name folders on a machine's own disk.
OF_MACHINE = ("cache_compiled", "data.cache_dir")


def intention(config: ConfigDict, workdir: epath.PathLike, overwrite: bool) -> dict[str, Any]:
    """Config, flags and code versions, which must be equal in all processes."""
    code = hashlib.sha256()
    root = pathlib.Path(calm_jax.__file__).parent
    for file in sorted(root.rglob("*.py")):
        code.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    keys = config_keys.flatten(config_keys.to_dict(config))
    return {
        "calm_jax": f"{calm_jax.__version__}, code {code.hexdigest()[:16]}",
        "jax": jax.__version__,
        "--workdir": str(absolute(workdir)),
        "--overwrite": overwrite,
        **{f"config.{key}": value for key, value in keys.items() if key not in OF_MACHINE},
    }


def origins(described: Described, datasets: Mapping[str, Dataset]) -> dict[str, str]:
    """Fingerprints of the frozen models and the data."""
    models = {f"the {one['role']}": one["fingerprint"] for one in described.identities}
    return models | {f"data.{split}": dataset.fingerprint for split, dataset in datasets.items()}


def check_visible(path: epath.Path) -> None:
    """Raises `CalmError` if this process does not see a file that process 0 wrote."""
    start = time.monotonic()
    while not path.exists():
        if time.monotonic() - start > VISIBLE_SECONDS:
            raise CalmError(
                f"process {jax.process_index()} does not see {path}, which process 0 wrote; "
                "--workdir must be on a file system that all processes share"
            )
        time.sleep(1)
