"""Processes that a test starts: the settings of the tests, and devices of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def environment(devices: int = 1) -> dict[str, str]:
    """The same programs as in this process come out of it, bit for bit, once models are tiny."""
    return {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        # The last of two counts holds.
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(*arguments, devices=1):
    """A process of this Python, and what it prints."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ends(processes):
    """Exit statuses and outputs, when all have ended."""
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs
