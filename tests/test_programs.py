"""How many compiled programs a process holds."""

import jax
import jax.numpy as jnp
import pytest
import tiny_models

from calm_jax import programs
from calm_jax.decoding import Generator, Sampling

PROMPTS = [[1, 2, 3], [*range(1, 41)], [4] * 20]


@pytest.mark.skipif(programs.mappings()[0] == 0, reason="only Linux limits mappings")
def test_programs_end_before_mappings_do(monkeypatch, caplog):
    generator = Generator(tiny_models.decoder(num_layers=2), max_length=64, slots=2)
    expected = generator.generate(PROMPTS, Sampling(max_new_tokens=4))
    used, most = programs.mappings()
    assert used < programs.MOST_USED * most
    programs.make_room()
    assert not caplog.records

    monkeypatch.setattr(programs, "MOST_USED", 0.0)
    jax.jit(jnp.cos)(1.0)
    programs.make_room()
    assert programs.mappings()[0] < used - 20  # those of at least five programs
    assert f"of {most} memory mappings" in caplog.text
    caplog.clear()
    programs.make_room()  # nothing was compiled since
    assert not caplog.records
    # Each step finds that the one before it was compiled, and drops it.
    assert generator.generate(PROMPTS, Sampling(max_new_tokens=4)) == expected
    assert len(caplog.records) >= 3
