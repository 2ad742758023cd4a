"""An open checkpoint of any kind."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
from etils import epath

from calm_jax.checkpoints.files import is_bucket
from calm_jax.errors import CalmError

Kind = Literal["huggingface", "gguf", "t5x", "orbax", "npz", "torch", "safetensors"]


class Tensor(Protocol):
    """An array of a checkpoint; indexing with whole numbers and slices reads only that part.

    A failed read raises `CalmError` naming file and tensor.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, index: Any) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """An open checkpoint."""

    path: epath.Path  # what the user named
    kind: Kind
    tensors: Mapping[str, Tensor]  # by their full names; in trees, the keys joined by "/"
    config: Mapping[str, Any] | None = None  # its own description (`config.json` of Hugging Face)
    # Tokenizer files inside it, by name; None: this kind of checkpoint holds none.
    vocabulary_files: Mapping[str, bytes] | None = None

    @property
    def config_path(self) -> epath.Path:
        """The file that `config` is read from."""
        return self.path if self.kind == "gguf" else self.path / "config.json"


@dataclasses.dataclass(frozen=True)
class Computed:
    """A `Tensor` that gets all its values from a function whenever it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.values()[index]


def refuse_bucket(path: epath.Path) -> None:
    """Raises `CalmError` for a checkpoint that can only be mapped from a disk."""
    if is_bucket(path):
        raise CalmError(f"{path} is in a bucket; copy the checkpoint to a disk first")
