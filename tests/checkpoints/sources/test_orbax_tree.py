"""Trees of Orbax in every layout that it writes and wrote, and damaged ones."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1

from calm_jax.checkpoints.sources import orbax_tree
from calm_jax.errors import CalmError


def tree():
    rng = np.random.default_rng(0)
    return {
        "transformer/layer_0/mlp": {"w": rng.normal(size=(6, 4)).astype(np.float32)},
        "norm": {"scale": jnp.asarray(rng.normal(size=5), jnp.bfloat16)},
        "list": [np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int8)],
        "step": np.asarray(7, np.int32),
        "empty": {},
        "nothing": None,
    }


NAMES = {"transformer/layer_0/mlp/w", "norm/scale", "list/0", "list/1", "step"}


def standard(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree())
    return folder


def pytree(**options):
    def write(folder):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree()))
        return folder

    return write


def version_one(folder):
    v1.save(folder, tree() | {"name": "text"})
    return folder


def manager(**items):
    def write(folder):
        with ocp.CheckpointManager(folder) as saver:
            trees = {name: ocp.args.StandardSave(tree()) for name in items}
            config = {"config": ocp.args.JsonSave({"a": 1})}
            saver.save(3, args=ocp.args.Composite(**trees, **config))
        return folder

    return write


def old(folder):
    """As before commit files, sharding files and metadata of the whole."""
    standard(folder)
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt", "_sharding", "array_metadatas"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


LAYOUTS = {
    "standard": standard,
    "files": pytree(use_ocdbt=False),
    "zarr3": pytree(use_ocdbt=True, use_zarr3=True),
    "zarr3 files": pytree(use_ocdbt=False, use_zarr3=True),
    "version 1": version_one,
    "run": manager(state=1),
    "step": lambda folder: manager(state=1)(folder) / "3",
    "old": old,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_what_orbax_wrote(tmp_path, layout):
    folder = LAYOUTS[layout](tmp_path / "tree")
    assert orbax_tree.is_orbax(folder)
    source = orbax_tree.read(folder)
    assert source.kind == "orbax"
    assert source.tensors.keys() == NAMES
    leaves, _ = jax.tree.flatten_with_path(tree())
    for path, expected in leaves:
        name = "/".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path)
        tensor = source.tensors[name]
        assert tensor.shape == expected.shape
        assert tensor.dtype == expected.dtype == tensor[...].dtype
        np.testing.assert_array_equal(tensor[...], expected)
    matrix = source.tensors["transformer/layer_0/mlp/w"]
    np.testing.assert_array_equal(matrix[2:5, 1], tree()["transformer/layer_0/mlp"]["w"][2:5, 1])


def test_opening_reads_no_weight(tmp_path):
    folder = pytree(use_ocdbt=False)(tmp_path / "tree")
    (folder / "norm.scale" / "0").unlink()
    tensors = orbax_tree.read(folder).tensors
    assert tensors["list/0"][1] == 1
    with pytest.raises(CalmError, match=r"tree: tensor norm/scale cannot be read: .*norm.scale/0"):
        tensors["norm/scale"][...]


@pytest.mark.parametrize("options", [{}, {"use_zarr3": True}])
def test_damaged_chunk(tmp_path, options):
    folder = pytree(use_ocdbt=False, **options)(tmp_path / "tree")
    chunk = folder / "transformer/layer_0/mlp.w" / ("c/0/0" if options else "0.0")
    chunk.write_bytes(chunk.read_bytes()[:-5])
    with pytest.raises(CalmError, match="tensor transformer/layer_0/mlp/w cannot be read"):
        orbax_tree.read(folder).tensors["transformer/layer_0/mlp/w"][...]


def test_truncated_ocdbt_data(tmp_path):
    folder = standard(tmp_path / "tree")
    for file in folder.glob("**/d/*"):
        file.write_bytes(b"")
    with pytest.raises(CalmError, match=r"tree: tensor \S+ cannot be opened: .*\S"):
        orbax_tree.read(folder)


def test_missing_array(tmp_path):
    folder = pytree(use_ocdbt=False)(tmp_path / "tree")
    shutil.rmtree(folder / "norm.scale")
    with pytest.raises(CalmError, match=r"tensor norm/scale cannot be opened: .*NOT_FOUND"):
        orbax_tree.read(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "_METADATA:1: not JSON"),
        ("{}", "_METADATA is damaged: it has no 'tree_metadata'"),
        (
            json.dumps({"tree_metadata": {"a": {}}}),
            "_METADATA is damaged: tree_metadata does not list",
        ),
    ],
)
def test_damaged_metadata(tmp_path, text, message):
    folder = standard(tmp_path / "tree")
    (folder / "_METADATA").write_text(text)
    with pytest.raises(CalmError, match=message):
        orbax_tree.read(folder)


@pytest.mark.parametrize("ocdbt", [False, True])
@pytest.mark.parametrize("key", ["../x", "a/../../x", "", "/", "/etc", "a//b", "\x00"])
def test_keys_that_are_no_names(tmp_path, key, ocdbt):
    folder = pytree(use_ocdbt=ocdbt)(tmp_path / "tree")
    values = json.loads((folder / "_METADATA").read_text())
    (entry,) = (v for k, v in values["tree_metadata"].items() if "scale" in k)
    entry["key_metadata"] = [{"key": key, "key_type": 2}]
    (folder / "_METADATA").write_text(json.dumps(values))
    with pytest.raises(
        CalmError, match=r"_METADATA: an array is called \[.*\], which is not a valid name"
    ):
        orbax_tree.read(folder)


def test_several_trees_are_listed(tmp_path):
    folder = manager(state=1, other=1)(tmp_path / "run") / "3"
    with pytest.raises(CalmError, match="holds several trees; name one of them: other, state"):
        orbax_tree.read(folder)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert not orbax_tree.is_orbax(tmp_path)
    with pytest.raises(CalmError, match="_METADATA is missing"):
        orbax_tree.read(tmp_path)


def test_an_unfinished_step_is_none(tmp_path):
    folder = manager(state=1)(tmp_path / "run")
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
    np.testing.assert_array_equal(orbax_tree.read(folder).tensors["list/0"][...], [0, 1, 2])
