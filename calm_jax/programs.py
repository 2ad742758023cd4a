"""Compiled programs: where they are kept on disk, and how many a process may hold.

XLA's CPU backend maps some hundreds of pieces of memory for each program of a model whose layers
run one by one. Linux grants a process 65,530 mappings by default, and XLA ends the process when it
gets no more.
"""

import functools
import os
import pathlib
import threading

from absl import logging

FOLDER = pathlib.Path("~/.cache/calm_jax/xla").expanduser()

MOST_USED = 0.7  # share of a process' mappings; what is left is enough for the next programs
_MAPPINGS = pathlib.Path("/proc/self/maps")
_MOST_MAPPINGS = pathlib.Path("/proc/sys/vm/max_map_count")
_COMPILED = "/jax/core/compile/backend_compile_duration"


def cache_programs(folder: str = "") -> None:
    """Keeps this process' compiled programs in `folder`.

    Default: `$JAX_COMPILATION_CACHE_DIR`, else `FOLDER`.
    """
    import jax  # takes half a second, which `--help` does not need

    folder = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(FOLDER)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def make_room() -> None:
    """Drops all programs if they use most of the mappings; those that are needed are made anew.

    To be called between programs. It costs nothing unless one was compiled since the last call.
    """
    import jax

    news = _news()
    if not news.is_set():
        return
    news.clear()
    used, most = mappings()
    if used > MOST_USED * most:
        logging.warning(
            "%d of %d memory mappings of this process are used: compiled programs are dropped, and "
            "compiled again when they are needed. A larger vm.max_map_count prevents that.",
            used,
            most,
        )
        jax.clear_caches()


@functools.cache
def _news() -> threading.Event:
    """Set whenever a program was compiled, or read from disk."""
    import jax

    news = threading.Event()
    news.set()

    def listen(event: str, *_, **__) -> None:
        if event == _COMPILED:
            news.set()

    jax.monitoring.register_event_duration_secs_listener(listen)
    return news


def mappings() -> tuple[int, float]:
    """The number of this process' memory mappings, and how many it may have; (0, inf) elsewhere."""
    if not _MOST_MAPPINGS.exists():
        return 0, float("inf")
    with _MAPPINGS.open("rb") as lines:
        return sum(1 for _ in lines), int(_MOST_MAPPINGS.read_text())
