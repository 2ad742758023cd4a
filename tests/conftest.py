"""Settings of all tests; the first two must stand before JAX is first imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import hypothesis

# A time limit would test the machine.
hypothesis.settings.register_profile("calm_jax", deadline=None)
hypothesis.settings.load_profile("calm_jax")
