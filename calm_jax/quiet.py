"""Starts libraries so that they print no notes and do not take each other's devices."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType


def import_tensorflow() -> ModuleType:
    """Imports TensorFlow, which takes seconds, without its start-up notes and its devices.

    JAX uses the accelerators; TensorFlow would take all their memory. Raises `ImportError` if it is
    not installed, or does not load; then its notes are shown.
    """
    # For every data set, its oneDNN kernels would warn about integer inputs.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with hidden_notes():
        import tensorflow

        for kind in ("GPU", "TPU"):
            tensorflow.config.set_visible_devices([], kind)
    return tensorflow


def quiet_libtpu() -> None:
    """Keeps libtpu silent on a machine without a TPU; call it before JAX looks for devices.

    An installed libtpu would print five lines about the TPU that it cannot find.
    """
    import jax  # noqa: F401 (importing it checks for TPU chips and records that there are none)

    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


@contextlib.contextmanager
def hidden_notes() -> Iterator[None]:
    """Hides what is written to the process' standard error, unless the block fails.

    Native libraries write there directly, before any log level takes effect.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as notes:
        shown = os.dup(2)
        os.dup2(notes.fileno(), 2)
        try:
            yield
        except BaseException:
            notes.seek(0)
            os.write(shown, notes.read())
            raise
        finally:
            os.dup2(shown, 2)
            os.close(shown)
