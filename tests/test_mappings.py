"""Programs end before the mappings of a process do."""

import jax
import pytest
import tiny_models

from calm_jax import mappings
from calm_jax.decoding import Generator, Sampling

# Each needs a prefill of its own.
PROMPTS = [[1, 2, 3], [*range(1, 20)], [*range(1, 41)]]


@pytest.fixture
def answers():
    """A function that answers all prompts, whose programs are compiled."""
    generator = Generator(tiny_models.decoder(num_layers=2), max_length=64, slots=1)

    def answers():
        return generator.generate(PROMPTS, Sampling(max_new_tokens=4))

    answers()
    return answers


@pytest.fixture
def most(tmp_path, monkeypatch):
    """A function that sets how many mappings a process may have."""
    monkeypatch.setattr(mappings, "_left", 0)
    # The programs of this test are a larger part of these mappings than programs usually are.
    monkeypatch.setattr(mappings, "GROWN", 1.0)
    monkeypatch.setattr(mappings, "_MOST", tmp_path / "max_map_count")
    return lambda count: (tmp_path / "max_map_count").write_text(f"{count}\n")


linux = pytest.mark.skipif(mappings.mappings()[0] == 0, reason="only Linux limits mappings")


@linux
def test_programs_are_dropped_when_few_mappings_are_left(answers, most, caplog):
    most(1_000_000)
    expected, (used, _) = answers(), mappings.mappings()
    assert not caplog.records

    most(used * 3 // 4)
    jax.jit(lambda x: x + 1)(1.0)
    mappings.make_room()
    assert mappings.mappings()[0] < used - 20  # those of at least five programs
    assert f" of {used * 3 // 4} memory mappings" in caplog.text
    caplog.clear()
    assert answers() == expected
    assert not caplog.records  # as many as before are no reason


@linux
def test_nothing_is_dropped_where_that_does_not_help(answers, most, caplog):
    """What other things than programs hold does not become less."""
    most(1_000_000)
    most(mappings.mappings()[0] // 2)
    jax.jit(lambda x: x + 2)(1.0)
    expected = answers()
    assert len(caplog.records) == 1
    assert answers() == expected
    assert len(caplog.records) == 1


def test_a_machine_that_does_not_tell_its_mappings(answers, tmp_path, monkeypatch):
    monkeypatch.setattr(mappings, "_OF_PROCESS", tmp_path / "none")
    jax.jit(lambda x: x + 3)(1.0)
    assert mappings.mappings() == (0, float("inf"))
    assert answers()
