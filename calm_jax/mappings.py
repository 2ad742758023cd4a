"""Memory mappings of this process, which XLA's CPU backend takes for every program.

A program of a model whose layers run one by one takes some hundreds. Linux grants a process 65,530
by default, and XLA ends the process when it gets no more.
"""

import functools
import pathlib
import threading

import jax
from absl import logging

MOST_USED = 0.7  # share of the mappings beyond which programs are dropped
GROWN = 0.1  # share that must have been added since programs were last dropped

_OF_PROCESS = pathlib.Path("/proc/self/maps")
_MOST = pathlib.Path("/proc/sys/vm/max_map_count")
_COMPILED = "/jax/core/compile/backend_compile_duration"

_left = 0  # mappings that were left when programs were last dropped


def make_room() -> None:
    """Drops all programs of the process if they use most of its mappings.

    Those that are needed again are compiled again. To be called between programs; it costs nothing
    unless one was compiled since the last call.
    """
    global _left
    compiled = _compiled()
    if not compiled.is_set():
        return
    compiled.clear()
    used, most = mappings()
    if used <= max(MOST_USED * most, _left + GROWN * most):
        return
    jax.clear_caches()
    _left, _ = mappings()
    logging.warning(
        "%d of %d memory mappings of this process were used, so all compiled programs are dropped; "
        "%d are left. A larger vm.max_map_count prevents that.",
        used,
        most,
        _left,
    )


def mappings() -> tuple[int, float]:
    """The number of this process' mappings, and how many it may have; (0, inf) if not told."""
    try:
        with _OF_PROCESS.open("rb") as lines:
            return sum(1 for _ in lines), int(_MOST.read_text())
    except OSError:  # not Linux, or no file can be opened
        return 0, float("inf")


@functools.cache
def _compiled() -> threading.Event:
    """Is set whenever a program was compiled, or read from disk."""
    compiled = threading.Event()
    compiled.set()

    def listen(event: str, *_, **__) -> None:
        if event == _COMPILED:
            compiled.set()

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiled
