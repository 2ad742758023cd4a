"""The check before a run's first step: does it fit?"""

import types

import jax
import jax.numpy as jnp
import pytest

from calm_jax import units
from calm_jax.chips import CHIPS
from calm_jax.training import fitting


def device(kind, platform="tpu", limit=None):
    stats = None if limit is None else {"bytes_limit": limit}
    return types.SimpleNamespace(platform=platform, device_kind=kind, memory_stats=lambda: stats)


def lowered(needed=0, error=None):
    """What `jax.jit(...).lower(...)` gives, as far as it is used."""
    memory = types.SimpleNamespace(peak_memory_in_bytes=needed)

    def compile(options):
        if error is not None:
            raise error
        return types.SimpleNamespace(memory_analysis=lambda: memory)

    return types.SimpleNamespace(compile=compile)


@pytest.mark.parametrize(
    "where, available",
    [
        (device("TPU v5 lite"), CHIPS["v5e"].hbm_bytes),
        (device("TPU v5 lite", limit=10_000), 10_000),
        (device("NVIDIA H200", "gpu", limit=2**37), 2**37),
    ],
)
def test_a_step_that_is_too_large_is_told(where, available):
    fitting.compile_to_fit(lowered(available), where)
    with pytest.raises(fitting.TooLarge) as told:
        fitting.compile_to_fit(lowered(available + 2**30), where)
    said = str(told.value)
    assert told.value.needed == available + 2**30
    assert f"needs {units.size(available + 2**30)} on each device" in said
    assert f"{where.device_kind} has {units.size(available)}" in said
    assert "train.accumulate" in said and "\n" not in said


@pytest.mark.parametrize(
    "message, needed",
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (128.50G) exceeds available HBM (15.75G).",
            int(128.5 * 2**30),
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate", None),
    ],
)
def test_a_compiler_that_finds_no_way_is_understood(message, needed):
    with pytest.raises(fitting.TooLarge) as told:
        fitting.compile_to_fit(
            lowered(error=jax.errors.JaxRuntimeError(message)), device("TPU v5 lite")
        )
    assert told.value.needed == needed
    assert "TPU v5 lite has 15.8 GiB" in str(told.value) and "\n" not in str(told.value)


def test_other_errors_of_the_compiler_stay_what_they_are():
    error = jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed")
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        fitting.compile_to_fit(lowered(error=error), device("TPU v5 lite"))


def test_nothing_is_said_where_the_memory_is_unknown():
    real = jax.jit(jnp.sin).lower(jnp.float32(1.0))
    assert fitting.compile_to_fit(real, jax.devices()[0])(jnp.float32(0.0)) == 0
    fitting.compile_to_fit(lowered(2**60), device("TPU v99"))
