"""Settings of all tests; those of the environment must stand before JAX is first imported."""

import gc
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# The tests' programs run once: the newer emitters compile two to three times as long, LLVM's
# optimisations take a tenth of the processor time of all tests, and to split a program into parts
# that are compiled at once takes a fifth.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false "
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)
# Every collective of every simulated device holds a thread until the other devices have come to
# it, and a device begins several at once. With one thread a device, XLA's choice on a machine of
# few cores, all of them can wait for a device that has none left; XLA then aborts.
os.environ["PJRT_NPROC"] = "64"
# A place in the source for every operation takes a tenth of the time of a program.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import browsers
import hypothesis
import pytest

# A time limit would test the machine.
hypothesis.settings.register_profile("calm_jax", deadline=None)
hypothesis.settings.load_profile("calm_jax")

# Tracing makes many objects and few circles: looking for them takes a tenth of the time.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium, which must be installed: pip has none."""
    if browsers.PROGRAM is None:
        pytest.skip("there is no chromium, chromium-browser or google-chrome on the PATH")
    browser = browsers.Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(autouse=True, scope="module")
def no_program_is_left():
    """The programs that a file compiled end with it.

    Each takes some of the mappings that Linux grants a process, and XLA crashes when all are used:
    the programs of half of the tests are enough. A run also caches its programs on disk; the tests
    of the next file must not write theirs there.
    """
    yield
    if "jax" in sys.modules:
        import jax
        from jax.experimental.compilation_cache import compilation_cache

        jax.clear_caches()
        if jax.config.jax_compilation_cache_dir is not None:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()
