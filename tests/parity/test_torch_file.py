"""Files that torch itself saves, read without it."""

import argparse
import collections
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from calm_jax.checkpoints.sources import torch_file
from calm_jax.errors import CalmError

torch = pytest.importorskip("torch", reason="torch is not installed: pip install .[parity]")


def tensors():
    torch.manual_seed(0)
    table = torch.randn(6, 4)
    made = {
        "float32": table,
        "tied": table,
        "transposed": table.T,
        "part": table[1:5:2, 2:],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "float16": torch.randn(5).half(),
        "bfloat16": torch.randn(2, 3, 4).bfloat16(),
        "float64": torch.randn(3).double(),
        "int64": torch.arange(7),
        "int8": torch.arange(7).to(torch.int8),
        "bool": torch.tensor([True, False]),
        "complex64": torch.randn(3, dtype=torch.complex64),
        "uint16": torch.arange(9).to(torch.uint16)[1:8:3],
        "float8": torch.randn(4, 3).to(torch.float8_e4m3fn).T,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "parameter with an attribute": torch.nn.Parameter(torch.randn(3)),
    }
    made["parameter with an attribute"].group = "decayed"
    return collections.OrderedDict(made)


def as_numpy(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.contiguous().view(torch.int8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.numpy()


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves(tmp_path, wrap, protocol):
    made = tensors()
    step = {
        "step": 3,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "dtype": torch.float32},
        "rng": torch.get_rng_state(),
        "bytes": torch.zeros(3).untyped_storage(),
    }
    content = made if wrap is None else {**step, wrap: made}
    path = epath.Path(tmp_path / "modèle café.pt")
    torch.save(content, path, pickle_protocol=protocol)
    found = torch_file.read(path).tensors
    assert list(found) == list(made)
    for name, tensor in made.items():
        expected = as_numpy(tensor)
        assert found[name].dtype == expected.dtype
        assert found[name].shape == expected.shape
        np.testing.assert_array_equal(np.asarray(found[name][...]), expected)


@pytest.mark.parametrize(
    "values",
    [torch.ones(3, dtype=torch.complex64).conj(), torch.ones(3, dtype=torch.complex64).conj().imag],
)
def test_values_that_are_not_the_stored_ones(tmp_path, values):
    torch.save({"w": values}, tmp_path / "model.pt")
    with pytest.raises(CalmError, match=r"a tensor is stored as \{'(conj|neg)': True\}"):
        torch_file.read(epath.Path(tmp_path / "model.pt"))


def test_a_state_dict_of_modules(tmp_path):
    """With the metadata that torch attaches to it."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(module.state_dict(), tmp_path / "model.pt")
    found = torch_file.read(epath.Path(tmp_path / "model.pt")).tensors
    assert {k: v.shape for k, v in found.items()} == {
        k: tuple(v.shape) for k, v in module.state_dict().items()
    }


def test_what_is_no_dictionary_of_tensors(tmp_path):
    refused = {
        r"torch\.nn\.modules\.linear\.Linear": torch.nn.Linear(3, 4),
        r"torch\._utils\._rebuild_sparse_tensor": {"w": torch.ones(3).to_sparse()},
        r"argparse\.Namespace": {"w": torch.ones(3), "options": argparse.Namespace(lr=0.1)},
    }
    for name, content in refused.items():
        torch.save(content, tmp_path / "refused.pt")
        with pytest.raises(CalmError, match=rf"refused\.pt: its pickle asks for {name}, which"):
            torch_file.read(epath.Path(tmp_path / "refused.pt"))
    torch.save(tensors(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CalmError, match=r"a torch before 1\.6"):
        torch_file.read(epath.Path(tmp_path / "old.pt"))


def test_torch_is_not_imported(tmp_path):
    torch.save(tensors(), tmp_path / "model.pt")
    program = f"""
import sys
from etils import epath
from calm_jax.checkpoints.sources import torch_file
source = torch_file.read(epath.Path({str(tmp_path / "model.pt")!r}))
assert source.tensors["part"][...].shape == (2, 2)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
