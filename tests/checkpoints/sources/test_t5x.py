"""T5X's forms on disk are read as one; what is damaged or leads elsewhere is refused."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import t5x_checkpoints as forms
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

FORMS = {
    "version 3": forms.write_t5x,
    "version 2": lambda p, t: forms.write_t5x(p, t, version=2),
    "gfile": lambda p, t: forms.write_t5x(p, t, driver="gfile"),
    "gcs": lambda p, t: forms.write_t5x(p, t, driver="gcs"),
    "path on top": lambda p, t: forms.write_t5x(p, t, path_on_top=True),
    "in the msgpack": lambda p, t: forms.write_t5x(p, t, apart=(NORM, KERNEL)),
    "marks of flaxformer": lambda p, t: forms.write_t5x(p, t | MARKS),
    "placeholders": forms.write_placeholders,
    "Orbax": forms.write_t5x_on_orbax,
    "Orbax's item": lambda p, t: forms.write_t5x_on_orbax(p, t) / "state",
    "only step": lambda p, t: forms.write_t5x(p / "checkpoint_100", t).parent,
    "only step on Orbax": lambda p, t: forms.write_t5x_on_orbax(p / "checkpoint_100", t).parent,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same(tmp_path, form):
    source = open_source(FORMS[form](tmp_path / "run", TENSORS))
    assert source.kind == "t5x"
    assert source.tensors.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        tensor = source.tensors[name]
        assert tensor.shape == expected.shape
        assert tensor.dtype == expected.dtype == tensor[...].dtype
        np.testing.assert_array_equal(tensor[...], expected)
    np.testing.assert_array_equal(source.tensors[KERNEL][1:3, 2], TENSORS[KERNEL][1:3, 2])


def test_specs_whose_lists_flax_wrote_as_dicts(tmp_path):
    place = forms.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    leaves = {name: forms.spec(name, array) for name, array in TENSORS.items()}
    tree = {"version": 3, "optimizer": {"target": forms.nested(leaves)}}
    (place / "checkpoint").write_bytes(serialization.to_bytes(tree))
    np.testing.assert_array_equal(t5x.read(place).tensors[NORM][...], TENSORS[NORM])


def test_several_steps_are_listed_and_unfinished_ones_are_not(tmp_path):
    for name in ("checkpoint_20", "checkpoint_9", "checkpoint_30.tmp-1700000000"):
        forms.write_t5x(tmp_path / name, TENSORS)
    with pytest.raises(CalmError, match=r"name one of them: checkpoint_9, checkpoint_20$"):
        open_source(tmp_path)


def test_mesh_tensorflow(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-0"\n')
    with pytest.raises(CalmError, match="is of Mesh TensorFlow"):
        open_source(tmp_path)


@pytest.mark.parametrize("version", [1, 4, None])
def test_other_versions(tmp_path, version):
    place = forms.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    forms.write_msgpack(place, {}, version)
    with pytest.raises(CalmError, match=f"has version {version} and keys .* 2 and 3 are supported"):
        open_source(place)


def test_no_parameters(tmp_path):
    place = forms.write_t5x(tmp_path / "checkpoint_1", MARKS)
    with pytest.raises(CalmError, match="checkpoint_1 has no parameters"):
        t5x.read(place)


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
    place = forms.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    file = place / "checkpoint"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CalmError, match=r"checkpoint_1/checkpoint (is damaged|has version)"):
        open_source(place)


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
    place = forms.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    change(place / KERNEL_FOLDER / "0.0.0")
    tensors = t5x.read(place).tensors
    np.testing.assert_array_equal(tensors[NORM][...], TENSORS[NORM])
    with pytest.raises(CalmError, match=f"checkpoint_1: tensor {KERNEL} cannot be read: "):
        tensors[KERNEL][...]


def test_missing_array(tmp_path):
    place = forms.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    shutil.rmtree(place / KERNEL_FOLDER)
    with pytest.raises(CalmError, match=f"tensor {KERNEL} cannot be opened: .*NOT_FOUND"):
        t5x.read(place)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("shape", [6, 4, 6], r"has shape \(6, 4, 5\) and dtype bfloat16, its .* \(6, 4, 6\)"),
        ("dtype", "<i2", r"has .* and dtype bfloat16, its zarr folder \(6, 4, 5\) and int16"),
    ],
)
def test_spec_contradicting_its_array(tmp_path, key, value, message):
    place = forms.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    file = place / KERNEL_FOLDER / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(CalmError, match=f"tensor {KERNEL} {message}"):
        t5x.read(place)


@pytest.mark.parametrize("path", ["../other/", "/etc/", "a/../../other", "."])
@pytest.mark.parametrize("form", ["spec", "placeholder"])
def test_paths_out_of_the_checkpoint(tmp_path, path, form):
    place = forms.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    leaf = forms.spec(KERNEL, TENSORS[KERNEL])
    leaf["kvstore"]["path"] = path
    leaf = leaf if form == "spec" else f"PLACEHOLDER://{path}"
    forms.write_msgpack(place, {KERNEL: leaf})
    with pytest.raises(CalmError, match=f"{KERNEL} is stored at .* which is not inside"):
        t5x.read(place)


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
    place = forms.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    forms.write_msgpack(place, {KERNEL: forms.spec(KERNEL, TENSORS[KERNEL]) | change})
    with pytest.raises(CalmError, match=f"checkpoint: tensor {KERNEL} {message}"):
        t5x.read(place)


def test_a_leaf_that_is_no_array(tmp_path):
    place = forms.write_t5x(tmp_path / "checkpoint_1", TENSORS)
    forms.write_msgpack(place, {KERNEL: "text"})
    with pytest.raises(CalmError, match=f"{KERNEL} is 'text', neither an array nor"):
        t5x.read(place)
