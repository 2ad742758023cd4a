"""A frozen folder damaged in random ways is refused, or is the same model: nothing else."""

import json
import random
import shutil

import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import stored_bytes

from calm_jax.checkpoints import frozen
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.errors import CalmError

BIT, CUT, LONGER, EMPTY, GONE, SWAPPED, RENAMED, NUMBER, COPIED = DAMAGES = (
    "a bit is flipped",
    "a file is cut",
    "a file is longer",
    "a file is empty",
    "a file is gone",
    "two files are swapped",
    "a file is renamed",
    "a number in JSON is another",
    "a file is a copy of another",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    decoder = tiny_models.decoder(
        family="llama", window=4, window_pattern=(True, False), num_layers=2
    )
    frozen.save_frozen(decoder, folder, vocabulary=load_vocabulary("key_value/tiny"))
    return folder, frozen.load(folder)


def damage(folder, kind: str, seed: int) -> str:
    """Damages one file or two; returns what was done."""
    choose = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if choose.random() < 0.5:  # most files are chunks
        files = [path for path in files if "/c." not in str(path)]
    if kind == NUMBER:
        files = [path for path in files if path.suffix == ".json"]
    path, other = choose.choice(files), choose.choice(files)
    data = bytearray(path.read_bytes())
    if kind == BIT:
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    elif kind == CUT:
        del data[choose.randrange(len(data)) :]
    elif kind == LONGER:
        data += choose.randbytes(choose.randint(1, 9))
    elif kind == EMPTY:
        data.clear()
    elif kind == NUMBER:
        digits = [index for index, byte in enumerate(data) if chr(byte).isdigit()]
        if digits:
            data[choose.choice(digits)] = ord(choose.choice("0123456789"))
    elif kind == COPIED:
        data = other.read_bytes()
    if kind == GONE:
        path.unlink()
    elif kind == RENAMED:
        path.rename(path.with_name(path.name + "x"))
    elif kind == SWAPPED:
        theirs = other.read_bytes()
        other.write_bytes(data)
        path.write_bytes(theirs)
    else:
        path.write_bytes(data)
    return f"{kind}: {path.relative_to(folder)}, {other.relative_to(folder)}"


@settings(max_examples=120)
@given(kind=st.sampled_from(DAMAGES), seed=st.integers(0, 2**32))
def test_damage_is_refused_or_changes_nothing(model, tmp_path_factory, kind, seed):
    folder, decoder = model
    damaged = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(folder, damaged)
    what = damage(damaged, kind, seed)
    try:
        loaded = frozen.load(damaged)
    except CalmError as error:
        assert "\n" not in str(error)
        assert "model" in str(error)
    else:
        assert stored_bytes(loaded) == stored_bytes(decoder), what
        assert loaded.config == decoder.config, what
        assert loaded.vocabulary.tokens() == decoder.vocabulary.tokens(), what
        assert loaded.fingerprint == decoder.fingerprint, what
    finally:
        shutil.rmtree(damaged)


def test_most_damage_matters(model, tmp_path):
    """The property above would hold for a reader that looked at nothing."""
    folder, _ = model
    refused = 0
    for seed in range(20):
        damaged = shutil.copytree(folder, tmp_path / str(seed))
        damage(damaged, BIT, seed)
        try:
            frozen.load(damaged)
        except CalmError:
            refused += 1
    assert refused >= 15


def test_config_in_another_layout_is_the_same(model, tmp_path):
    folder, decoder = model
    same = shutil.copytree(folder, tmp_path / "same")
    values = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(values, indent=7))
    assert stored_bytes(frozen.load(same)) == stored_bytes(decoder)
