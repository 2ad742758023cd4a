"""Where compiled programs are kept on disk, so that later processes need not compile them."""

import os
import pathlib

FOLDER = pathlib.Path("~/.cache/calm_jax/xla").expanduser()


def cache_programs(folder: str = "") -> None:
    """Keeps this process' compiled programs in `folder`.

    Default: `$JAX_COMPILATION_CACHE_DIR`, else `FOLDER`.
    """
    import jax  # takes half a second, which `--help` does not need

    folder = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(FOLDER)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
