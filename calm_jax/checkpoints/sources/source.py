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
    """An open checkpoint.

    Attributes:
        path: what the user named.
        kind: how it is stored.
        tensors: every array by its full name; in trees, the keys joined by "/".
        config: the checkpoint's own description (`config.json` of Hugging Face), or None.
        vocabulary_files: tokenizer files inside the checkpoint, by name; None: this kind of
            checkpoint holds none.
    """

    path: epath.Path
    kind: Kind
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None
    vocabulary_files: Mapping[str, bytes] | None = None

    @property
    def config_path(self) -> epath.Path:
        """The file that `config` is read from."""
        return self.path if self.kind == "gguf" else self.path / "config.json"


@dataclasses.dataclass(frozen=True)
class Computed:
    """A `Tensor` whose values, all of them, are computed from others whenever it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.values()[index]


def refuse_bucket(path: epath.Path) -> None:
    """Raises `CalmError` for a checkpoint that can only be mapped from a disk."""
    if is_bucket(path):
        raise CalmError(f"{path} is in a bucket; copy the checkpoint to a disk first")
