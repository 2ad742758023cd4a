"""What a process that a test starts is given: the settings of the tests, and its own devices."""

import os
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
