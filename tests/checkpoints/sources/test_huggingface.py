"""Folders of Hugging Face: what is read, how much of it, and what damaged ones say.

Files are made here by the description of the container, not by the library that reads them.
"""

import json
import math
import os
import tracemalloc

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import torch_files
from etils import epath
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from calm_jax.checkpoints.sources.huggingface import read, read_file
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.errors import CalmError

NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.int64): "I64",
    np.dtype(np.uint8): "U8",
    np.dtype(bool): "BOOL",
}
CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4}


def container(tensors, changes=None):
    """Bytes of a safetensors file; `changes` are entries of its header."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in tensors.items():
        offsets = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": NAMES[x.dtype], "shape": x.shape, "data_offsets": offsets}
        data += x.tobytes()
    for name, change in (changes or {}).items():
        header[name] = {**header[name], **change}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def header(text):
    return len(text).to_bytes(8, "little") + text


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return epath.Path(tmp_path)


def ramp(*shape, dtype=np.float32):
    return np.arange(math.prod(shape)).reshape(shape).astype(dtype)


TENSORS = {"a": ramp(4, 6), "b": ramp(3, dtype=ml_dtypes.bfloat16), "c": ramp(2, 2, 2)}


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60)
def test_parts_of_tensors_are_those_of_numpy(tmp_path_factory, data):
    x = data.draw(
        arrays.arrays(
            data.draw(st.sampled_from(sorted(NAMES, key=str))),
            arrays.array_shapes(max_dims=4, max_side=5),
            elements=st.integers(0, 1),
            fill=st.nothing(),
        )
    )
    x = x + np.arange(x.size).reshape(x.shape).astype(x.dtype)
    index = tuple(
        data.draw(
            st.integers(0, size - 1)
            | st.tuples(st.integers(0, size - 1), st.integers(1, size)).map(
                lambda ends, size=size: slice(ends[0], min(ends[0] + ends[1], size))
            )
        )
        for size in x.shape[: data.draw(st.integers(0, x.ndim))]
    )
    path = epath.Path(tmp_path_factory.mktemp("file")) / "x.safetensors"
    path.write_bytes(container({"other": ramp(3), "x": x, "last": ramp(2)}))
    tensor = read_file(path).tensors["x"]
    assert (tensor.shape, tensor.dtype) == (x.shape, x.dtype)
    for part in (index, ...):
        found = tensor[part]
        assert found.dtype == x.dtype
        assert found.shape == x[part].shape
        assert found.tobytes() == x[part].tobytes()


def test_scalars_and_empty_tensors(folder):
    tensors = {"scalar": np.full((), 3, np.float32), "empty": np.zeros((0, 3), np.float32)}
    (folder / "model.safetensors").write_bytes(container(tensors))
    found = read(folder).tensors
    assert found["scalar"][...] == 3
    assert found["empty"][...].shape == (0, 3)


def test_only_the_part_that_is_asked_for_is_in_memory(folder):
    big, count = ramp(64, 1024, 32), 3
    (folder / "model.safetensors").write_bytes(container({str(i): big for i in range(count)}))
    tracemalloc.start()
    try:
        source = open_source(folder)
        part = source.tensors["1"][5:7, :, 3:5]
        small_peak = tracemalloc.get_traced_memory()[1]
        for name in source.tensors:
            assert source.tensors[name][...].shape == big.shape
        whole_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(part, big[5:7, :, 3:5])
    assert small_peak < big.nbytes / 8
    assert whole_peak < big.nbytes / 8  # views of the mapped file


def write_shards(folder, shards, weight_map=None):
    """Shards by their file names, and the index of them."""
    for file, tensors in shards.items():
        (folder / file).write_bytes(container(tensors))
    file_of = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": {**file_of, **(weight_map or {})}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {ONE: {"a": TENSORS["a"], "c": TENSORS["c"]}, TWO: {"b": TENSORS["b"]}}


def assert_same(source, tensors=TENSORS):
    assert set(source.tensors) == set(tensors)
    for name, x in tensors.items():
        assert source.tensors[name][...].tobytes() == x.tobytes()


def test_one_file_shards_and_files_without_an_index_are_the_same_model(folder):
    (folder / "model.safetensors").write_bytes(container(TENSORS))
    (folder / "consolidated.safetensors").write_bytes(container({"of another program": ramp(1)}))
    assert_same(read(folder))
    (folder / "model.safetensors").unlink()
    write_shards(folder, SHARDS)
    assert_same(read(folder))
    (folder / "consolidated.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    assert_same(read(folder))
    assert read(folder).config == CONFIG


def test_links_of_a_download_cache_are_followed(folder):
    blobs = folder / "blobs"
    blobs.mkdir()
    snapshot = folder / "snapshots"
    snapshot.mkdir()
    write_shards(snapshot, SHARDS)
    (folder / "config.json").rename(snapshot / "config.json")
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name)
        os.symlink(f"../blobs/{file.name}", file)
    assert_same(read(snapshot))


def test_a_file_alone(folder):
    path = folder / "some.safetensors"
    path.write_bytes(container(TENSORS))
    beside = open_source(path)
    assert (beside.kind, beside.path, beside.config) == ("huggingface", folder, CONFIG)
    assert_same(beside)
    (folder / "config.json").unlink()
    alone = open_source(path)
    assert (alone.kind, alone.path, alone.config) == ("safetensors", path, None)
    assert_same(alone)


def test_an_unsupported_dtype_is_named_when_it_is_needed(folder):
    eight_bits = {"b": {"dtype": "F8_E4M3", "shape": [6]}}
    (folder / "model.safetensors").write_bytes(container(TENSORS, eight_bits))
    tensors = read(folder).tensors
    assert np.array_equal(tensors["a"][...], TENSORS["a"])
    for use in (lambda: tensors["b"].dtype, lambda: tensors["b"][...]):
        with pytest.raises(CalmError, match=r"model\.safetensors: tensor b is F8_E4M3"):
            use()


WHOLE = container(TENSORS)


@pytest.mark.parametrize(
    "data",
    {
        "empty": b"",
        "only a length": WHOLE[:8],
        "cut in the header": WHOLE[:30],
        "cut in the data": WHOLE[:-1],
        "more than the header says": WHOLE + b"0",
        "a long header": (2**40).to_bytes(8, "little") + WHOLE[8:],
        "no JSON": WHOLE.replace(b'{"__', b'["__', 1),
        "offsets past the end": container(TENSORS, {"c": {"data_offsets": [102, 1134]}}),
        "offsets that overlap": container(TENSORS, {"b": {"data_offsets": [90, 96]}}),
        "a shape of another size": container(TENSORS, {"a": {"shape": [4, 7]}}),
        "a negative size": container(TENSORS, {"a": {"shape": [-4, -6]}}),
        "a header nested too deeply": header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
        "a list for an object": header(b'{"a": ["F32", [0], [0, 0]]}'),
        "an unknown dtype": container(TENSORS, {"a": {"dtype": "F33"}}),
    }.items(),
    ids=lambda case: case[0],
)
def test_damaged_files(folder, data):
    (folder / "model.safetensors").write_bytes(data[1])
    with pytest.raises(
        CalmError, match=r"model\.safetensors is not a complete safetensors file"
    ) as error:
        read(folder)
    assert "\n" not in str(error.value)


@hypothesis.given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
@hypothesis.settings(max_examples=150)
def test_a_changed_byte_is_refused_or_changes_values_alone(tmp_path_factory, position, change):
    damaged = bytearray(WHOLE)
    damaged[position] ^= change
    file = epath.Path(tmp_path_factory.mktemp("file")) / "x.safetensors"
    file.write_bytes(bytes(damaged))
    try:
        tensors = read_file(file).tensors
        for name in tensors:
            assert tensors[name][...].size <= len(WHOLE)
    except CalmError as error:
        assert "x.safetensors" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"d": "model-00003-of-00002.safetensors"}, "index.json: tensor d is in .*, which is miss"),
        ({"d": "../secret.safetensors"}, "index.json: tensor d is in .*not a file of the folder"),
        ({"d": "/etc/passwd"}, "index.json: tensor d is in '/etc/passwd', which is not a file of"),
        ({"d": ".."}, r"tensor d is in '\.\.', which is not a file of"),
        ({"d": ""}, "tensor d is in '', which is not a file of"),
        ({"d": 3}, "tensor d is in 3, which is not a file of"),
        ({"d": ONE}, f"{ONE}: tensor d is missing"),
        ({"a": TWO}, f"{ONE}: tensor a is not in this file, says .*index.json, but in {TWO}"),
    ],
)
def test_an_index_that_contradicts_its_shards(folder, weight_map, message):
    write_shards(folder, SHARDS, weight_map)
    with pytest.raises(CalmError, match=message):
        read(folder)


def test_a_shard_with_more_than_its_index(folder):
    write_shards(folder, SHARDS)
    (folder / TWO).write_bytes(container({"b": TENSORS["b"], "more": ramp(2)}))
    with pytest.raises(CalmError, match=f"{TWO}: tensor more is not in this file.*but in none"):
        read(folder)
    (folder / TWO).write_bytes(container({"b": TENSORS["b"], "a": ramp(2)}))
    with pytest.raises(CalmError, match=f"{TWO}: tensor a is not in this file.*but in {ONE}"):
        read(folder)


def test_tensors_twice(folder):
    write_shards(folder, SHARDS)
    (folder / "model.safetensors").write_bytes(WHOLE)
    with pytest.raises(CalmError, match=r"both model\.safetensors and model\.safetensors\.index"):
        read(folder)
    for file in ("model.safetensors", "model.safetensors.index.json"):
        (folder / file).unlink()
    (folder / "z.safetensors").write_bytes(container({"b": ramp(1)}))
    with pytest.raises(CalmError, match=rf"z\.safetensors: tensor b is also in {TWO}"):
        read(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "index.json is damaged"),
        ("{", "index.json:1: not JSON"),
        ("{}", "index.json is damaged: it has no 'weight_map'"),
        ('{"weight_map": []}', "weight_map does not map"),
        ('{"weight_map": {}}', "weight_map does not map"),
    ],
)
def test_damaged_indexes(folder, text, message):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CalmError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a Hugging Face checkpoint: config.json is missing"),
        ("{", "config.json:1: not JSON"),
        ("[]", "config.json is damaged: it is not a JSON object"),
        ('{"architectures": "Llama"}', "config.json: architectures is 'Llama'"),
        ('{"architectures": [3]}', r"config.json: architectures is \[3\]"),
    ],
)
def test_configs(folder, text, message):
    (folder / "model.safetensors").write_bytes(WHOLE)
    if text is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(text)
    with pytest.raises(CalmError, match=message):
        read(folder)


def test_a_folder_of_before_safetensors(folder):
    torch_files.save_tensors(folder / "pytorch_model.bin", TENSORS)
    source = read(folder)
    assert (source.kind, source.config) == ("huggingface", CONFIG)
    assert source.tensors.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(source.tensors[name][...], array)
    # The same weights in safetensors stand above it.
    (folder / "model.safetensors").write_bytes(container({"a": TENSORS["a"] + 1}))
    np.testing.assert_array_equal(read(folder).tensors["a"][...], TENSORS["a"] + 1)


def test_a_folder_without_tensors(folder):
    with pytest.raises(CalmError, match=r"no tensors in \.safetensors files or pytorch_model\.bin"):
        read(folder)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(CalmError, match=r"in several pickled files, which are not supported"):
        read(folder)
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CalmError, match=r"cannot read .*/model\.safetensors: Is a directory"):
        read(folder)


def test_buckets_are_said_to_be_copied_first():
    with pytest.raises(CalmError, match=r"gs://bucket/model\.safetensors is in a bucket; copy"):
        read_file(epath.Path("gs://bucket/model.safetensors"))
    with pytest.raises(CalmError, match=r"gs://bucket/model is in a bucket; copy"):
        read(epath.Path("gs://bucket/model"))


def test_a_file_that_stands_for_its_folder(folder):
    (folder / "weights.safetensors").write_bytes(container(TENSORS))
    source = read_file(folder / "weights.safetensors")
    assert (source.path, source.config) == (folder, CONFIG)
    (folder / "more.safetensors").write_bytes(container(TENSORS))
    with pytest.raises(CalmError, match=r"weights\.safetensors is not alone: .*more\.safetensors"):
        read_file(folder / "weights.safetensors")
