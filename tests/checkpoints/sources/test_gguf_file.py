"""GGUF files are read as the `gguf` package reads them, and damaged ones are refused."""

import struct

import gguf
import gguf_files
import numpy as np
import pytest

from calm_jax.checkpoints.sources import gguf_file
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.errors import CalmError

METADATA = {
    "general.name": "größer",
    "llama.block_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": ["", "▁", "\n", "名"],
    "tokenizer.ggml.scores": [0.0, -0.5, -1e30, 3.0],
    "tokenizer.ggml.token_type": [1, 3, 4, 6],
}
SHAPES = {"matrix": (3, 512), "vector": (7,), "cube": (2, 3, 256)}


@pytest.fixture(scope="module", params=gguf_files.KINDS, ids=lambda kind: kind.name)
def file(request, tmp_path_factory):
    """(path, how its matrices are stored)."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(path, request.param)
    return path, request.param


def write(path, kind, metadata=METADATA):
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in metadata.items():
        gguf_files.add(writer, key, value)
    generator = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        x = generator.normal(size=shape).astype(np.float32)
        own = kind if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf_files.stored(x, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_tensors(file, monkeypatch):
    """To the last bit, however few rows are dequantised at a time."""
    path, kind = file
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for group in (gguf_file.GROUP_VALUES, 600):
        monkeypatch.setattr(gguf_file, "GROUP_VALUES", group)
        tensors = open_source(path).tensors
        assert {name: tensor.shape for name, tensor in tensors.items()} == SHAPES
        for name, tensor in tensors.items():
            expected = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
            assert np.array_equal(tensor[...].astype(np.float32), expected), (name, group)
            assert tensor[...].dtype == tensor.dtype
            assert np.array_equal(tensor[1:, ...], tensor[...][1:])
    stored = {gguf.GGMLQuantizationType.F16: "float16", gguf.GGMLQuantizationType.BF16: "bfloat16"}
    assert tensors["matrix"].dtype.name == stored.get(kind, "float32")


def test_metadata(file):
    path, _ = file
    found = open_source(path).config
    for key, value in METADATA.items():
        numbers = isinstance(value, list) and not isinstance(value[0], str)
        assert found[key] == (pytest.approx(value, rel=1e-7) if numbers else value), key
    assert found["llama.attention.layer_norm_rms_epsilon"] == 1e-5  # as published, not 9.99…e-06
    fields = gguf.GGUFReader(path).fields
    assert set(found) == {name for name in fields if not name.startswith("GGUF.")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(path, gguf.GGMLQuantizationType.Q8_0)
    return path.read_bytes()


def refused(path, data, pattern):
    path.write_bytes(data)
    with pytest.raises(CalmError, match=pattern) as error:
        open_source(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_every_cut_is_refused(data, tmp_path):
    """The last tensor ends at the last byte but for padding."""
    sizes = {*range(0, 600, 7), *range(len(data) // 2, len(data) - 32, 997)}
    for size in sizes:
        refused(tmp_path / "cut.gguf", data[:size], "is not a complete GGUF file")


@pytest.mark.parametrize(
    ("start", "value", "pattern"),
    [
        (0, b"GGML", "starts with b'GGML'"),
        (4, struct.pack("<I", 1), "of version 1; versions 2 and 3"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 2**63), "has 0 axes"),
        (16, struct.pack("<Q", 2**63), "the header needs"),
        (24, struct.pack("<Q", 2**63), "the header needs"),
    ],
)
def test_headers(data, tmp_path, start, value, pattern):
    refused(tmp_path / "m.gguf", data[:start] + value + data[start + len(value) :], pattern)


def test_lengths_of_lists(data, tmp_path):
    """One that the file has no room for ends at once."""
    start = data.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    longer = data[:start] + struct.pack("<Q", 2**60) + data[start + 8 :]
    refused(tmp_path / "m.gguf", longer, "the header needs")


def test_types_of_tensors(data, tmp_path):
    start = data.index(b"matrix") + len(b"matrix") + 4 + 2 * 8
    for kind, pattern in ((200, "type 200, which gguf .* lacks"), (24, "")):
        changed = data[:start] + struct.pack("<I", kind) + data[start + 4 :]
        if pattern:
            refused(tmp_path / "m.gguf", changed, pattern)
    path = tmp_path / "integers.gguf"
    path.write_bytes(changed)
    with pytest.raises(CalmError, match=r"tensor matrix is I8, which gguf .* does not dequantise"):
        _ = open_source(path).tensors["matrix"].dtype


def test_folders_of_gguf_files(tmp_path):
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CalmError, match=r"is a folder; name one of its files: a\.gguf, b\.gguf"):
        open_source(tmp_path)
    with pytest.raises(CalmError, match="is not a complete GGUF file"):
        open_source(tmp_path / "a.gguf")
