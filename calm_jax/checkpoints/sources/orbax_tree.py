"""Trees of arrays that Orbax wrote: a folder with `_METADATA`, or one that holds one such folder.

TensorStore reads them, not Orbax: any number of devices may have written them, folders of old
versions lack files that Orbax now needs, and only the needed parts are read.
"""

from collections.abc import Callable

from etils import epath

from calm_jax.checkpoints.files import read_field, read_json
from calm_jax.checkpoints.sources.source import Source
from calm_jax.checkpoints.sources.tensorstore_array import StoredTensor, open_all, zarr_spec
from calm_jax.errors import CalmError

_UNFINISHED = ".orbax-checkpoint-tmp"


def is_orbax(folder: epath.Path) -> bool:
    """Whether `folder` is a tree, or a step or a run of a CheckpointManager that holds one."""
    return bool(_trees(folder))


def read(folder: epath.Path) -> Source:
    """Opens a tree; names are its keys joined by "/".

    Args:
        folder: the tree's folder, or one of a CheckpointManager: a step, or a run of one step, with
            one item that is a tree.

    Raises:
        CalmError: there is no tree or more than one, or it is damaged.
    """
    trees = _trees(folder)
    if not trees:
        raise CalmError(f"{folder} is not a tree of Orbax: _METADATA is missing")
    if len(trees) > 1:
        listed = ", ".join(str(tree.relative_to(folder)) for tree in trees)
        raise CalmError(f"{folder} holds several trees; name one of them: {listed}")
    return Source(folder, "orbax", open_tree(trees[0]))


def open_tree(
    folder: epath.Path, rename: Callable[[str], str | None] = lambda name: name
) -> dict[str, StoredTensor]:
    """The tensors of the tree in `folder` by their new names; `rename` returns None to skip one."""
    path = folder / "_METADATA"
    driver = "zarr3" if read_json(path, "a tree of Orbax").get("use_zarr3") else "zarr"
    ocdbt = (folder / "manifest.ocdbt").exists()
    specs = {
        new_name: zarr_spec(folder, stored, driver=driver, ocdbt=ocdbt)
        for name, stored in array_names(folder).items()
        if (new_name := rename(name)) is not None
    }
    return open_all(specs, str(folder))


def array_names(folder: epath.Path) -> dict[str, str]:
    """The names of the arrays of the tree in `folder`, with the path of each array there."""
    path = folder / "_METADATA"
    entries = read_field(read_json(path, "a tree of Orbax"), "tree_metadata", path)
    found = {}
    try:
        for entry in entries.values():
            keys = [str(part["key"]) for part in entry["key_metadata"]]
            if _is_array(entry["value_metadata"]):
                found["/".join(keys)] = stored = ".".join(keys)
                if not all(map(_is_plain, stored.split("/"))):
                    raise CalmError(f"{path}: an array is called {keys}, which is not a valid name")
    except (AttributeError, KeyError, TypeError):
        raise CalmError(f"{path} is damaged: tree_metadata does not list arrays") from None
    return found


def _trees(folder: epath.Path) -> list[epath.Path]:
    for depth in ("_METADATA", "*/_METADATA", "*/*/_METADATA"):
        found = [path.parent for path in folder.glob(depth) if _UNFINISHED not in str(path)]
        if found:
            return sorted(found)
    return []


def _is_plain(part: str) -> bool:
    """Whether a part of a path is a name that does not lead out of its folder."""
    return part.isprintable() and part not in ("", ".", "..")


def _is_array(value_metadata: dict) -> bool:
    """Whether a leaf is an array; empty dicts, None and text are also leaves."""
    kind, skipped = value_metadata.get("value_type"), value_metadata.get("skip_deserialize")
    return not skipped and kind not in ("string", "None", "Dict", "List")
