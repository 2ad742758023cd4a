"""Recognises how a checkpoint is stored, and opens it."""

import os
from collections.abc import Callable

from etils import epath

from calm_jax.checkpoints.files import ADAPTER_CONFIG, absolute, does_not_exist, storage
from calm_jax.checkpoints.sources import huggingface, npz, orbax_tree, t5x, torch_file
from calm_jax.checkpoints.sources.source import Source
from calm_jax.errors import CalmError


def open_source(path: str | os.PathLike) -> Source:
    """Opens a checkpoint of any kind that `calm_jax.convert` reads; no weight is read.

    Raises `CalmError` if the path does not exist, is of no known kind, or is damaged.
    """
    path = absolute(path)
    with storage("read", path):
        if not path.exists():
            raise CalmError(f"{path} is not a checkpoint: {does_not_exist(path)}")
        return _reader(path)(path)


def _reader(path: epath.Path) -> Callable[[epath.Path], Source]:
    if not path.is_dir():
        if path.suffix in (".safetensors", ".bin"):
            return huggingface.read_file
        if path.suffix == ".gguf":
            from calm_jax.checkpoints.sources import gguf_file  # its library takes long to import

            return gguf_file.read
        if path.suffix == ".npz":
            return npz.read
        if path.suffix in (".pt", ".pth"):
            return torch_file.read
        raise CalmError(
            f"{path} is not a known kind of checkpoint; files are .gguf, .npz, .pt, .pth, .bin, "
            ".safetensors"
        )
    if (path / "chunks.json").exists():
        raise CalmError(f"{path} is already a frozen folder; --to=huggingface exports it")
    if (path / ADAPTER_CONFIG).exists() and not (path / "config.json").exists():
        raise CalmError(
            f"{path} is an adapter, not a model; give its base model as --source and this folder "
            "as --adapter"
        )
    if (path / "config.json").exists() or list(path.glob("*.safetensors*")):
        return huggingface.read
    if t5x.is_t5x(path):
        return t5x.read
    if orbax_tree.is_orbax(path):
        return orbax_tree.read
    files = ", ".join(sorted(file.name for file in path.glob("*.gguf")))
    if files:
        raise CalmError(f"{path} is a folder; name one of its files: {files}")
    raise CalmError(
        f"{path} is not a known kind of checkpoint: it has no config.json, no .safetensors files, "
        "and no file named checkpoint (T5X) or _METADATA (Orbax)"
    )
