"""Files of numpy: lazily read, nothing of Python's pickles, damage named."""

import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_jax.checkpoints.sources import npz
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.errors import CalmError

RNG = np.random.default_rng(0)
TENSORS = {
    "decoder/kernel": RNG.normal(size=(4, 3, 5)).astype(np.float32),
    "decoder/fortran": np.asfortranarray(RNG.normal(size=(4, 3))),
    "scale": RNG.normal(size=6).astype(ml_dtypes.bfloat16),
    "step": np.asarray(3, np.int32),
    "empty": np.zeros((0, 2), np.int8),
}


@pytest.fixture(params=[np.savez, np.savez_compressed])
def file(tmp_path, request):
    request.param(tmp_path / "tree.npz", **TENSORS)
    return tmp_path / "tree.npz"


def test_reads_every_member_and_slice(file):
    source = open_source(file)
    assert source.kind == "npz"
    assert source.tensors.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        tensor = source.tensors[name]
        assert tensor.shape == expected.shape
        assert tensor.dtype == expected.dtype == tensor[...].dtype
        np.testing.assert_array_equal(tensor[...], expected)
    np.testing.assert_array_equal(
        source.tensors["decoder/kernel"][:, 1, 2:], TENSORS["decoder/kernel"][:, 1, 2:]
    )


def test_python_objects_are_refused(tmp_path):
    np.savez(tmp_path / "tree.npz", fine=np.ones(3), objects=np.array([{}, []], object))
    with pytest.raises(CalmError, match=r"tree.npz: tensor objects holds Python objects"):
        npz.read(tmp_path / "tree.npz")


def test_a_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "tree.npz", "w") as archive:
        archive.writestr("notes.txt", "some text that is no array")
    with pytest.raises(CalmError, match=r"tensor notes.txt cannot be read: .*magic"):
        npz.read(tmp_path / "tree.npz")


def test_a_member_shorter_than_its_shape(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 4), np.float32))
    with zipfile.ZipFile(tmp_path / "tree.npz", "w") as archive:
        archive.writestr("a.npy", (tmp_path / "a.npy").read_bytes()[:-8])
    with pytest.raises(CalmError, match=r"tensor a of shape \(4, 4\) has 56 bytes, not 64"):
        npz.read(tmp_path / "tree.npz")


def test_no_zip_at_all(tmp_path):
    (tmp_path / "tree.npz").write_bytes(b"not a zip")
    with pytest.raises(CalmError, match=r"tree.npz cannot be read: BadZipFile"):
        npz.read(tmp_path / "tree.npz")


@given(data=st.data())
def test_damage_is_an_error_or_has_no_effect(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    np.savez_compressed(folder / "tree.npz", **TENSORS)
    content = bytearray((folder / "tree.npz").read_bytes())
    if data.draw(st.booleans(), "cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1), "length")]
    else:
        content[data.draw(st.integers(0, len(content) - 1), "at")] ^= data.draw(
            st.integers(1, 255), "bits"
        )
    (folder / "tree.npz").write_bytes(content)
    try:
        found = {
            name: tensor[...] for name, tensor in npz.read(folder / "tree.npz").tensors.items()
        }
    except CalmError as error:
        assert "tree.npz" in str(error)
        return
    # Neither a zip's nor numpy's format guards names.
    found = {name: array for name, array in found.items() if name in TENSORS}
    for name, array in found.items():
        np.testing.assert_array_equal(array, TENSORS[name])


def test_a_name_twice(tmp_path):
    np.savez(tmp_path / "a.npz", w=np.zeros(3))
    data = zipfile.ZipFile(tmp_path / "a.npz").read("w.npy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, of the duplicate
        with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
            archive.writestr("w.npy", data)
    with pytest.raises(CalmError, match=r"a\.npz: tensor w occurs twice"):
        open_source(tmp_path / "a.npz")
