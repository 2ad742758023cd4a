"""The tasks and vocabularies that come with the library, found by name.

A vocabulary is called "NAME" or "NAME/CONFIG", a task "calm_jax/NAME/CONFIG/…".
"""

import importlib
from types import ModuleType
from typing import Any

# Each module has `vocabulary(config)`, `task_fingerprint(task)`, which is None for other tasks, and
# `TASKS`, the module that registers its seqio Tasks when it is imported.
_MODULES = {"key_value": "calm_jax.data.key_value"}


def vocabulary(spec: str) -> Any:
    """The `Vocabulary` of that name, or None. Raises `CalmError` for an unknown config."""
    name, _, config = spec.partition("/")
    return _module(name).vocabulary(config) if name in _MODULES else None


def task_fingerprint(task: str) -> str | None:
    """A name for all that determines a task's texts; None if the task is not built in."""
    return next(filter(None, (_module(name).task_fingerprint(task) for name in _MODULES)), None)


def register_tasks() -> None:
    """Registers all tasks with seqio (imports TensorFlow)."""
    for name in _MODULES:
        importlib.import_module(_module(name).TASKS)


def _module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])
