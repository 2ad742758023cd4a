"""What the processes of a run compare before it starts."""

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
from calm_jax.data.source import Source
from calm_jax.errors import CalmError
from calm_jax.training import config_keys
from calm_jax.training.run_model import Described

# What another process wrote may stay unseen until a file system forgets that it was absent.
VISIBLE_SECONDS = 60

# Places on a machine's own disk.
OF_MACHINE = ("cache_compiled", "data.cache_dir")


def intention(config: ConfigDict, workdir: epath.PathLike, overwrite: bool) -> dict[str, Any]:
    """What all processes must have been told, and the code they must run."""
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


def origins(described: Described, sources: Mapping[str, Source]) -> dict[str, str]:
    """Fingerprints of the frozen models and the data."""
    models = {f"the {one['role']}": one["fingerprint"] for one in described.identities}
    return models | {f"data.{split}": source.fingerprint for split, source in sources.items()}


def check_visible(path: epath.Path) -> None:
    """Raises `CalmError` unless this process sees what the first one wrote."""
    asked = time.monotonic()
    while not path.exists():
        if time.monotonic() - asked > VISIBLE_SECONDS:
            raise CalmError(
                f"process {jax.process_index()} does not see {path}, which process 0 wrote; "
                "--workdir must be on a file system that all share"
            )
        time.sleep(1)
