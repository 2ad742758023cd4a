"""Trees of arrays that Orbax wrote: a folder with `_METADATA`, or one that holds a single such.

Read with TensorStore, not with Orbax: any number of devices may have written them, folders of old
versions lack files that Orbax asks for today, and each array is read only where it is needed.
"""

from etils import epath

from calm_jax.checkpoints.files import read_field, read_json
from calm_jax.checkpoints.sources.source import Source
from calm_jax.checkpoints.sources.tensorstore_array import open_all, zarr_spec
from calm_jax.errors import CalmError

_UNFINISHED = ".orbax-checkpoint-tmp"


def is_orbax(place: epath.Path) -> bool:
    """Whether `place` is a tree, or a step or a run of a CheckpointManager that holds one."""
    return bool(_trees(place))


def read(place: epath.Path) -> Source:
    """Opens a tree; names are its keys joined by "/".

    Args:
        place: the tree's folder, or one of a CheckpointManager: a step, or a run of one step, with
            one item that is a tree.

    Raises:
        CalmError: there is no tree or more than one, or it is damaged.
    """
    return Source(place, "orbax", open_tree(tree_folder(place)))


def tree_folder(place: epath.Path) -> epath.Path:
    """The folder of the only tree. Raises `CalmError` when there is none or more than one."""
    trees = _trees(place)
    if not trees:
        raise CalmError(f"{place} is no tree of Orbax: _METADATA is missing")
    if len(trees) > 1:
        listed = ", ".join(str(tree.relative_to(place)) for tree in trees)
        raise CalmError(f"{place} holds several trees; name one of them: {listed}")
    return trees[0]


def open_tree(folder: epath.Path, below: str = "") -> dict:
    """The tensors of a tree's folder by their names.

    Args:
        folder: holds `_METADATA`.
        below: only names that begin so.
    """
    path = folder / "_METADATA"
    metadata = read_json(path, "a tree of Orbax")
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    ocdbt = (folder / "manifest.ocdbt").exists()
    specs = {}
    for entry in read_field(metadata, "tree_metadata", path).values():
        try:
            keys = [str(part["key"]) for part in entry["key_metadata"]]
            value = entry["value_metadata"]
        except (KeyError, TypeError):
            raise CalmError(f"{path} is damaged: it has an entry {entry!r}") from None
        name = "/".join(keys)
        if name.startswith(below) and _is_array(value):
            specs[name] = zarr_spec(folder, ".".join(keys), driver=driver, ocdbt=ocdbt)
    return open_all(specs, str(folder))


def _trees(place: epath.Path) -> list[epath.Path]:
    for depth in ("_METADATA", "*/_METADATA", "*/*/_METADATA"):
        found = [path.parent for path in place.glob(depth) if _UNFINISHED not in str(path)]
        if found:
            return sorted(found)
    return []


def _is_array(value_metadata: dict) -> bool:
    """Empty dicts, None and text are leaves too, and have no array."""
    return not value_metadata.get("skip_deserialize") and value_metadata.get("value_type") not in (
        "string",
        "None",
        "Dict",
        "List",
    )
