"""Checkpoints of T5X: only the parameters, not the optimizer's state.

There are three layouts on disk (`t5x/checkpoints.py`):
 legacy: a msgpack file `checkpoint` whose leaves are arrays, or TensorStore specs of zarr folders
  in the same folder; version 3, or 2, which stores bfloat16 as uint16;
 old Orbax (2022 to 2023): the same file with leaves `PLACEHOLDER://<folder>`;
 Orbax: a folder `state/` with `_METADATA`.
"""

import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
from etils import epath

from calm_jax.checkpoints.files import first_line, is_bucket, read_bytes
from calm_jax.checkpoints.sources import orbax_tree
from calm_jax.checkpoints.sources.source import Source, Tensor
from calm_jax.checkpoints.sources.tensorstore_array import open_all, zarr_spec
from calm_jax.errors import CalmError

Leaf = TypeVar("Leaf")

VERSIONS = (2, 3)
# T5X takes the paths of all three as relative to the checkpoint's folder, and ignores buckets.
_STORES = ("file", "gfile", "gcs")
_PLACEHOLDER = "PLACEHOLDER://"
_MESH_TENSORFLOW = b"model_checkpoint_path"
_PARAMETERS = re.compile(r"(?:_?optimizer/)?target/(.+)")
# Flaxformer writes these among the parameters, to mark its own versions.
_MARKS = ("__save_format_metadata__", "__version__")


def is_t5x(path: epath.Path) -> bool:
    """Whether `path` is a checkpoint of T5X, or a folder of them."""
    return bool(_checkpoints(path))


def read(path: epath.Path) -> Source:
    """Opens the parameters; their names are those below `target`.

    Args:
        path: a folder `checkpoint_<step>`, or one that holds a single such folder.

    Raises:
        CalmError: there is more than one step, the layout is not supported, or it is damaged.
    """
    found = _checkpoints(path)
    if not found:
        raise CalmError(f"{path} is not a checkpoint of T5X: it has no file named checkpoint")
    if len(found) > 1:
        listed = ", ".join(step.name for step in found)
        raise CalmError(f"{path} holds several checkpoints; name one of them: {listed}")
    (folder,) = found
    tree = _orbax_folder(folder)
    tensors = orbax_tree.open_tree(tree, _parameter_name) if tree else _read_msgpack(folder)
    if not tensors:
        raise CalmError(f"{folder} has no parameters: its tree has nothing below target")
    return Source(path, "t5x", tensors)


def _is_checkpoint(folder: epath.Path) -> bool:
    return _orbax_folder(folder) is not None or (folder / "checkpoint").is_file()


def _checkpoints(folder: epath.Path) -> list[epath.Path]:
    """The folder itself, or the finished checkpoints in it, by step."""
    if _is_checkpoint(folder):
        return [folder]
    found = [path for path in folder.glob("checkpoint_*") if re.search(r"_\d+$", path.name)]
    found = [path for path in found if _is_checkpoint(path)]
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]))


def _orbax_folder(folder: epath.Path) -> epath.Path | None:
    """The folder of Orbax's tree, if this is T5X on Orbax, whose tree has a `target`."""
    for tree in (folder / "state", folder):
        if (tree / "_METADATA").is_file():
            return tree if any(map(_parameter_name, orbax_tree.array_names(tree))) else None
    return None


def _parameter_name(name: str) -> str | None:
    """The name of a parameter from its full path; None for the optimizer's state."""
    found = _PARAMETERS.fullmatch(name)
    return None if found is None or any(mark in name for mark in _MARKS) else found[1]


def parameters(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The parameters, by their names below `target`, among leaves by their full paths."""
    named = {_parameter_name(path): leaf for path, leaf in leaves.items()}
    return {name: leaf for name, leaf in named.items() if name is not None}


def _read_msgpack(folder: epath.Path) -> dict[str, Tensor]:
    path = folder / "checkpoint"
    version, leaves = _parse(path)
    ocdbt = (folder / "manifest.ocdbt").exists()
    specs, arrays, expected = {}, {}, {}
    for name, leaf in leaves.items():
        called = f"{path}: tensor {name}"
        if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
            inside = _inside(folder, leaf.removeprefix(_PLACEHOLDER), called)
            specs[name] = zarr_spec(folder, inside, ocdbt=ocdbt)
        elif isinstance(leaf, Mapping):
            inside, expected[name] = _check_spec(leaf, called)
            specs[name] = zarr_spec(folder, _inside(folder, inside, called))
        elif isinstance(leaf, np.ndarray | np.generic):
            arrays[name] = np.asarray(leaf)
        elif leaf is not None:
            raise CalmError(f"{called} is {leaf!r}, neither an array nor the place of one")
    tensors = open_all(specs, str(folder), bfloat16_as_uint16=version == 2)
    for name, (shape, dtype) in expected.items():
        store = tensors[name].store
        if (shape, dtype) != (store.shape, store.dtype.name):
            raise CalmError(
                f"{path}: tensor {name} has shape {shape} and dtype {dtype}, its zarr folder "
                f"{tuple(store.shape)} and {store.dtype.name}"
            )
    return {**tensors, **arrays}


def _parse(path: epath.Path) -> tuple[int | None, dict[str, Any]]:
    """The version of a msgpack file, and its parameters by name."""
    from flax import serialization

    data = read_bytes(path)
    if data.startswith(_MESH_TENSORFLOW):
        raise CalmError(
            f"{path} is a checkpoint of Mesh TensorFlow (model_checkpoint_path), which is not "
            "supported; convert it with T5X"
        )
    try:
        contents = serialization.msgpack_restore(data)
    except Exception as error:  # msgpack, numpy and Flax each raise exceptions of their own
        raise CalmError(
            f"{path} is damaged: it is not a complete msgpack file ({first_line(error)})"
        ) from None
    leaves = dict(_leaves(contents, str(path)))
    placeholders = any(isinstance(x, str) and x.startswith(_PLACEHOLDER) for x in leaves.values())
    version = contents.get("version")
    if not placeholders and version not in VERSIONS:
        raise CalmError(
            f"{path} has version {version!r} and keys {sorted(map(str, contents))}; T5X's versions "
            f"{' and '.join(map(str, VERSIONS))} are supported"
        )
    return version, parameters(leaves)


def _leaves(tree: Any, where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of nested dicts; a TensorStore spec is a leaf."""
    if not isinstance(tree, Mapping):
        raise CalmError(f"{where} is damaged: it holds a {type(tree).__name__}, not a tree")
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and not value.keys() >= {"driver", "kvstore", "metadata"}:
            yield from _leaves(value, where, f"{name}/")
        else:
            yield name, value


def _check_spec(spec: Mapping[str, Any], called: str) -> tuple[str, tuple[tuple[int, ...], str]]:
    """The path of the array in a spec, and the (shape, dtype) that the spec gives it."""
    store = spec["kvstore"]
    try:
        kinds = spec["driver"], store["driver"]
        # Before TensorStore 0.1.14 the path was the array's, not the store's.
        path = os.fspath(store.get("path") or spec["path"])
        shape = spec["metadata"]["shape"]
        # Flax writes a list as a dict, unless a function for the whole spec is registered.
        shape = shape.values() if isinstance(shape, Mapping) else shape
        shape_and_dtype = tuple(map(int, shape)), str(spec["dtype"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CalmError(f"{called} has a damaged spec ({error!r}): {dict(spec)}") from None
    if kinds[0] != "zarr" or kinds[1] not in _STORES:
        raise CalmError(
            f"{called} is stored as {kinds[0]} on {kinds[1]}; supported is zarr on "
            f"{', '.join(_STORES)}"
        )
    return path, shape_and_dtype


def _inside(folder: epath.Path, path: str, called: str) -> str:
    """`path` relative to the checkpoint's folder; raises `CalmError` if it leads out of it."""
    root = f"/{str(folder).partition('://')[2]}" if is_bucket(folder) else str(folder)
    whole = posixpath.normpath(posixpath.join(root, path))
    inside = posixpath.relpath(whole, root)
    if inside == "." or inside.startswith(".."):
        raise CalmError(f"{called} is stored at {path!r}, which is not inside {folder}")
    return inside
