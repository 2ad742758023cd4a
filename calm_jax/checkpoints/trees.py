"""Small trees of arrays, such as a bridge, as Orbax checkpoints."""

import orbax.checkpoint as ocp
from etils import epath

from calm_jax.checkpoints.files import first_line
from calm_jax.errors import CalmError
from calm_jax.models.parameters import Tree, check_same_tree


def save_tree(path: epath.Path, tree: Tree) -> None:
    """Writes a tree. Raises `CalmError` if it cannot be written."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    except Exception as error:  # a full disk may raise any of many exceptions
        raise CalmError(f"cannot write {path}: {first_line(error)}") from error


def restore_tree(path: epath.Path, abstract: Tree) -> Tree:
    """Restores a tree with the shapes, dtypes and shardings of `abstract`.

    Raises `CalmError` naming the first array that is missing, is unknown or has another shape.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
            if metadata is None:
                raise CalmError(f"{path} is missing or half-written")
            check_same_tree(abstract, metadata.tree, str(path))
            return checkpointer.restore(path, abstract)
    except CalmError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many exceptions on a damaged folder
        raise CalmError(f"{path} cannot be read: {first_line(error)}") from error
