"""T5X's layouts on disk are read as one; what is damaged or leads elsewhere is refused."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import t5x_checkpoints
from flax import serialization

from calm_jax.checkpoints.sources import t5x
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.errors import CalmError

RNG = np.random.default_rng(0)
TENSORS = {
    "decoder/norm/scale": RNG.normal(size=7).astype(np.float32),
    "decoder/decoder/kernel": RNG.normal(size=(6, 4, 5)).astype(ml_dtypes.bfloat16),
    "decoder/decoder/qkernel": RNG.integers(-127, 127, size=(3, 4)).astype(np.int8),
}
NORM = "decoder/norm/scale"
KERNEL = "decoder/decoder/kernel"
KERNEL_FOLDER = "target.decoder.decoder.kernel"
MARKS = {
    "__save_format_metadata__/__version__": np.zeros(1, np.float32),
    "decoder/__version__": np.zeros(1, np.float32),
}

LAYOUTS = {
    "version 3": t5x_checkpoints.write_t5x,
    "version 2": lambda p, t: t5x_checkpoints.write_t5x(p, t, version=2),
    "gfile": lambda p, t: t5x_checkpoints.write_t5x(p, t, driver="gfile"),
    "gcs": lambda p, t: t5x_checkpoints.write_t5x(p, t, driver="gcs"),
    "path on top": lambda p, t: t5x_checkpoints.write_t5x(p, t, path_on_top=True),
    "in the msgpack": lambda p, t: t5x_checkpoints.write_t5x(p, t, apart=(NORM, KERNEL)),
    "marks of flaxformer": lambda p, t: t5x_checkpoints.write_t5x(p, t | MARKS),
    "placeholders": t5x_checkpoints.write_placeholders,
    "Orbax": t5x_checkpoints.write_t5x_on_orbax,
    "Orbax's item": lambda p, t: t5x_checkpoints.write_t5x_on_orbax(p, t) / "state",
    "only step": lambda p, t: t5x_checkpoints.write_t5x(p / "checkpoint_100", t).parent,
    "only step on Orbax": lambda p, t: (
        t5x_checkpoints.write_t5x_on_orbax(p / "checkpoint_100", t).parent
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same(tmp_path, layout):
    source = open_source(LAYOUTS[layout](tmp_path / "run", TENSORS))
    assert source.kind == "t5x"
    assert source.tensors.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        tensor = source.tensors[name]
        assert tensor.shape == expected.shape
        assert tensor.dtype == expected.dtype == tensor[...].dtype
        np.testing.assert_array_equal(tensor[...], expected)
    np.testing.assert_array_equal(source.tensors[KERNEL][1:3, 2], TENSORS[KERNEL][1:3, 2])


def test_specs_whose_lists_flax_wrote_as_dicts(tmp_path):
    folder = t5x_checkpoints.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    leaves = {name: t5x_checkpoints.spec(name, array) for name, array in TENSORS.items()}
    tree = {"version": 3, "optimizer": {"target": t5x_checkpoints.nested(leaves)}}
    (folder / "checkpoint").write_bytes(serialization.to_bytes(tree))
    np.testing.assert_array_equal(t5x.read(folder).tensors[NORM][...], TENSORS[NORM])


def test_several_steps_are_listed_and_unfinished_ones_are_not(tmp_path):
    for name in ("checkpoint_20", "checkpoint_9", "checkpoint_30.tmp-1700000000"):
        t5x_checkpoints.write_t5x(tmp_path / name, TENSORS)
    with pytest.raises(CalmError, match=r"name one of them: checkpoint_9, checkpoint_20$"):
        open_source(tmp_path)


def test_mesh_tensorflow(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-0"\n')
    with pytest.raises(CalmError, match="is a checkpoint of Mesh TensorFlow"):
        open_source(tmp_path)


@pytest.mark.parametrize("version", [1, 4, None])
def test_other_versions(tmp_path, version):
    folder = t5x_checkpoints.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    t5x_checkpoints.write_msgpack(folder, {}, version)
    with pytest.raises(CalmError, match=f"has version {version} and keys .* 2 and 3 are supported"):
        open_source(folder)


def test_no_parameters(tmp_path):
    folder = t5x_checkpoints.write_t5x(tmp_path / "checkpoint_1", MARKS)
    with pytest.raises(CalmError, match="checkpoint_1 has no parameters"):
        t5x.read(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[: len(b) // 2],
        lambda b: b"\xc1" + b,
        lambda b: b"\x05",
        bytes.swapcase,
    ],
)
def test_damaged_msgpack(tmp_path, damage):
    folder = t5x_checkpoints.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    file = folder / "checkpoint"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CalmError, match=r"checkpoint_1/checkpoint (is damaged|has version)"):
        open_source(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda chunk: chunk.unlink(),
        lambda chunk: chunk.write_bytes(chunk.read_bytes()[:-40]),
        lambda chunk: chunk.write_bytes(b""),
        lambda chunk: chunk.write_bytes(b"\x00" * 50),
    ],
    ids=["absent", "truncated", "empty", "not gzip"],
)
def test_damaged_chunk_is_an_error_of_its_tensor_alone(tmp_path, change):
    folder = t5x_checkpoints.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    change(folder / KERNEL_FOLDER / "0.0.0")
    tensors = t5x.read(folder).tensors
    np.testing.assert_array_equal(tensors[NORM][...], TENSORS[NORM])
    with pytest.raises(CalmError, match=f"checkpoint_1: tensor {KERNEL} cannot be read: "):
        tensors[KERNEL][...]


def test_missing_array(tmp_path):
    folder = t5x_checkpoints.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    shutil.rmtree(folder / KERNEL_FOLDER)
    with pytest.raises(CalmError, match=f"tensor {KERNEL} cannot be opened: .*NOT_FOUND"):
        t5x.read(folder)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("shape", [6, 4, 6], r"has shape \(6, 4, 5\) and dtype bfloat16, its .* \(6, 4, 6\)"),
        ("dtype", "<i2", r"has .* and dtype bfloat16, its zarr folder \(6, 4, 5\) and int16"),
    ],
)
def test_spec_contradicting_its_array(tmp_path, key, value, message):
    folder = t5x_checkpoints.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    file = folder / KERNEL_FOLDER / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(CalmError, match=f"tensor {KERNEL} {message}"):
        t5x.read(folder)


@pytest.mark.parametrize("path", ["../other/", "/etc/", "a/../../other", "."])
@pytest.mark.parametrize("layout", ["spec", "placeholder"])
def test_paths_out_of_the_checkpoint(tmp_path, path, layout):
    folder = t5x_checkpoints.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    leaf = t5x_checkpoints.spec(KERNEL, TENSORS[KERNEL])
    leaf["kvstore"]["path"] = path
    leaf = leaf if layout == "spec" else f"PLACEHOLDER://{path}"
    t5x_checkpoints.write_msgpack(folder, {KERNEL: leaf})
    with pytest.raises(CalmError, match=f"{KERNEL} is stored at .* which is not inside"):
        t5x.read(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kvstore": {"driver": "http", "path": "x"}}, "is stored as zarr on http"),
        ({"driver": "n5"}, "is stored as n5 on file"),
        ({"kvstore": 3}, "has a damaged spec"),
        ({"kvstore": {"driver": "file"}}, "has a damaged spec"),
        ({"kvstore": {"driver": "file", "path": 3}}, "has a damaged spec"),
        ({"metadata": {"shape": "wide"}}, "has a damaged spec"),
        ({"metadata": None}, "has a damaged spec"),
    ],
)
def test_strange_specs(tmp_path, change, message):
    folder = t5x_checkpoints.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    t5x_checkpoints.write_msgpack(
        folder, {KERNEL: t5x_checkpoints.spec(KERNEL, TENSORS[KERNEL]) | change}
    )
    with pytest.raises(CalmError, match=f"checkpoint: tensor {KERNEL} {message}"):
        t5x.read(folder)


def test_a_leaf_that_is_no_array(tmp_path):
    folder = t5x_checkpoints.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    t5x_checkpoints.write_msgpack(folder, {KERNEL: "text"})
    with pytest.raises(CalmError, match=f"{KERNEL} is 'text', neither an array nor"):
        t5x.read(folder)
