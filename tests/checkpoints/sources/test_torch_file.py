"""Files of torch.save: views of storages, and no code."""

import os
import random
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch_files
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from calm_jax.checkpoints.sources import torch_file
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.errors import CalmError


def random_tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0).normal
    return {
        "a.weight": draw(size=(5, 3)).astype(np.float32),
        "b.weight": draw(size=(4,)).astype(np.float16),
        "c.weight": draw(size=(2, 3, 4)).astype(ml_dtypes.bfloat16),
        "d": np.arange(6),
        "e": np.float32(3.5).reshape(()),
        "f": np.zeros((0, 3), np.float32),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype
        assert np.asarray(found[name][...]).tobytes() == array.tobytes(), name


def read(path) -> dict:
    return dict(torch_file.read(epath.Path(path)).tensors)


def test_a_state_dict(tmp_path):
    torch_files.save_tensors(tmp_path / "model.pt", random_tensors())
    source = open_source(tmp_path / "model.pt")
    assert source.kind == "torch"
    assert_same(dict(source.tensors), random_tensors())
    np.testing.assert_array_equal(
        source.tensors["a.weight"][1:3, 2], random_tensors()["a.weight"][1:3, 2]
    )


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", "module"])
def test_wrapped_and_with_prefixes(tmp_path, wrapper):
    prefixed = {f"module.{name}": array for name, array in random_tensors().items()}

    def wrap(pickled):
        other = torch_files.dictionary({"step": torch_files.number(3)})
        return torch_files.dictionary({"optimizer": other, wrapper: pickled})

    torch_files.save_tensors(tmp_path / "model.pt", prefixed, wrap)
    assert_same(read(tmp_path / "model.pt"), random_tensors())


def test_views_of_one_storage(tmp_path):
    data = np.arange(24, dtype=np.float32)
    views = {
        "whole": (0, (4, 6), (6, 1)),
        "transposed": (0, (6, 4), (1, 6)),
        "part": (7, (2, 3), (6, 1)),
        "repeated": (5, (3,), (0,)),
    }
    items = {k: torch_files.tensor("0", np.float32, 24, *view) for k, view in views.items()}
    torch_files.save(tmp_path / "m.pt", torch_files.dictionary(items), {"0": data.tobytes()})
    table = data.reshape(4, 6)
    expected = {"whole": table, "transposed": table.T.copy(), "part": table[1:3, 1:4].copy()}
    expected["repeated"] = np.full(3, 5, np.float32)
    assert_same(read(tmp_path / "m.pt"), expected)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ((20, (2, 3), (3, 1)), "reaches entry 25 of a storage of 24"),
        ((0, (2, 3), (-3, 1)), "no sensible shape and strides"),
        ((0, (2,), (1, 1)), "no sensible shape and strides"),
        ((-1, (2,), (1,)), "no sensible shape and strides"),
    ],
)
def test_views_beyond_their_storage(tmp_path, view, message):
    pickled = torch_files.dictionary({"w": torch_files.tensor("0", np.float32, 24, *view)})
    torch_files.save(tmp_path / "model.pt", pickled, {"0": bytes(96)})
    with pytest.raises(CalmError, match=rf"model\.pt: tensor w.*{message}"):
        read(tmp_path / "model.pt")


def test_a_storage_of_another_size_or_none(tmp_path):
    pickled = torch_files.dictionary({"w": torch_files.tensor("0", np.float32, 4, 0, (4,), (1,))})
    torch_files.save(tmp_path / "model.pt", pickled, {"0": bytes(12)})
    with pytest.raises(CalmError, match=r"tensor w: storage 0 has 12 bytes, not 16"):
        read(tmp_path / "model.pt")
    torch_files.save(tmp_path / "model.pt", pickled, {})
    with pytest.raises(CalmError, match=r"archive/data/0 is missing"):
        read(tmp_path / "model.pt")


def marker_pickles(marker) -> dict[str, bytes]:
    command = f"touch {marker}"
    return {
        "os.system": b"cos\nsystem\n(" + torch_files.text(command) + b"tR",
        "posix.system": b"cposix\nsystem\n(" + torch_files.text(command) + b"tR",
        "builtins.eval": b"cbuiltins\neval\n("
        + torch_files.text(f"open({str(marker)!r}, 'w')")
        + b"tR",
        "torch.load": b"ctorch\nload\n(" + torch_files.text(str(marker)) + b"tR",
    }


@pytest.mark.parametrize("name", ["os.system", "posix.system", "builtins.eval", "torch.load"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_did_not_run(tmp_path, name, inside):
    marker = tmp_path / "marker"
    pickled = marker_pickles(marker)[name]
    if inside:  # after a tensor that is fine
        fine = torch_files.tensor("0", np.float32, 4, 0, (4,), (1,))
        pickled = torch_files.dictionary({"w": fine, "x": pickled})
    torch_files.save(tmp_path / "model.pt", pickled, {"0": bytes(16)})
    with pytest.raises(CalmError, match=rf"asks for {name}.*; it was not run"):
        read(tmp_path / "model.pt")
    assert not marker.exists()


def test_what_torch_writes_otherwise(tmp_path):
    path = tmp_path / "model.pt"
    torch_files.save_tensors(path, random_tensors(), byteorder="big")
    with pytest.raises(CalmError, match=r"byteorder is b'big'"):
        read(path)
    torch_files.save_tensors(path, random_tensors(), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CalmError, match=r"is compressed"):
        read(path)
    path.write_bytes(torch_file._BEFORE_ZIP + b"more")
    with pytest.raises(CalmError, match=r"a torch before 1\.6; load it with torch and save it"):
        read(path)
    torch_files.save(path, torch_files.number(3), {})
    with pytest.raises(CalmError, match=r"holds no dictionary of tensors"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(CalmError, match=r"is no whole file of torch\.save"):
        read(path)


def test_a_damaged_storage_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "model.pt"
    torch_files.save_tensors(path, random_tensors())
    data = path.read_bytes()
    at = data.index(random_tensors()["a.weight"].tobytes())
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    tensors = read(path)
    with pytest.raises(CalmError, match=r"model\.pt: archive/data/0 is damaged: its CRC-32 is"):
        tensors["a.weight"][0]
    tensors["b.weight"][0]


@settings(max_examples=400)
@given(seed=st.integers(0, 2**32))
def test_damage_is_refused_or_changes_nothing(tmp_path_factory, seed):
    choose = random.Random(seed)
    path = tmp_path_factory.mktemp("torch") / "model.pt"
    torch_files.save_tensors(path, random_tensors())
    data = bytearray(path.read_bytes())
    kind = choose.choice(["bit", "cut", "zeros", "longer", "moved"])
    at = choose.randrange(len(data))
    if kind == "bit":
        data[at] ^= 1 << choose.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "zeros":
        data[at : at + choose.randint(1, 50)] = bytes(choose.randint(1, 50))
    elif kind == "longer":
        data += choose.randbytes(choose.randint(1, 50))
    else:
        data = data[at:] + data[:at]
    path.write_bytes(data)
    try:
        found = {name: np.asarray(tensor[...]) for name, tensor in read(path).items()}
    except CalmError as error:
        assert "\n" not in str(error)
    else:
        assert_same(found, random_tensors())
    finally:
        os.remove(path)
