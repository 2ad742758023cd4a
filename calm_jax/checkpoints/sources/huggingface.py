"""Hugging Face folders: config.json and safetensors, in one file or in shards.

The container is described at https://huggingface.co/docs/safetensors. Its own library checks a
file's header; tensors are views of the mapped file, since the library would copy them.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from calm_jax.checkpoints.files import explained, read_field, read_json, refuse_lfs_pointer
from calm_jax.checkpoints.kinds import BRIDGE, COMPOSED_RUN, DECODER_RUN, FROZEN, kind_of
from calm_jax.checkpoints.sources import torch_file
from calm_jax.checkpoints.sources.source import Source, refuse_bucket
from calm_jax.errors import CalmError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"  # before safetensors
_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
    "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16,
    "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip


def read(folder: epath.Path) -> Source:
    """Opens a folder; no weight is read.

    Tensors are those of the shards in `model.safetensors.index.json`, of `model.safetensors`, of
    all `.safetensors` files together, or if there is none, of `pytorch_model.bin`.

    Raises:
        CalmError: the folder is in a bucket; config.json is missing or damaged; index and shards
            contradict each other, or two shards have the same tensor; a file is damaged.
    """
    refuse_bucket(folder)
    config = _read_config(folder)
    if (folder / INDEX).exists():
        tensors = _indexed(folder)
    elif (folder / SINGLE).exists():
        tensors = open_file(folder / SINGLE)
    else:
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            for name, tensor in open_file(file).items():
                if name in tensors:
                    raise CalmError(f"{file}: tensor {name} is also in {tensors[name].file.name}")
                tensors[name] = tensor
        if not tensors and (folder / PICKLED).exists():
            tensors = torch_file.read(folder / PICKLED).tensors
        if not tensors and (folder / f"{PICKLED}.index.json").exists():
            raise CalmError(
                f"{folder} has its tensors in several pickled files, which are not supported; save "
                "them as safetensors with transformers"
            )
        if not tensors:
            raise CalmError(
                f"{folder} has a {CONFIG}, but no tensors in .safetensors files or {PICKLED}"
            )
    return Source(folder, "huggingface", tensors, config)


def read_file(path: epath.Path) -> Source:
    """Opens one `.safetensors` or `.bin` file.

    A file that transformers reads, with a config.json in its folder, means that folder. Raises
    `CalmError` as `read` does, and if that folder also holds other weights.
    """
    refuse_bucket(path)
    is_pickled = path.suffix == ".bin"
    if (is_pickled and path.name != PICKLED) or not (path.parent / CONFIG).exists():
        if is_pickled:
            return torch_file.read(path)
        return Source(path, "safetensors", open_file(path))
    others = {file.name for file in path.parent.glob("*.safetensors")} - {path.name}
    if others:
        raise CalmError(
            f"{path} is not alone: its folder also has a {CONFIG} and {sorted(others)[0]}; name "
            "the folder, or move the file to one of its own"
        )
    return read(path.parent)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file; see `Tensor`."""

    file: epath.Path
    name: str
    shape: tuple[int, ...]
    stored_as: str
    data: np.ndarray  # the mapped bytes

    @property
    def dtype(self) -> np.dtype:
        if self.stored_as not in _DTYPES:
            raise CalmError(
                f"{self.file}: tensor {self.name} is {self.stored_as}, which is not supported"
            )
        return np.dtype(_DTYPES[self.stored_as])

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.data.view(self.dtype).reshape(self.shape)[index]


def open_file(file: epath.Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. Raises `CalmError` if it is damaged."""
    refuse_lfs_pointer(file)
    damages = (SafetensorError, OSError, RecursionError, TypeError, ValueError)
    with explained(f"{file} is not a complete safetensors file", damages):
        with safe_open(str(file), framework="numpy"):
            pass  # opening it raises unless the header describes the whole file
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        data = np.asarray(np.memmap(file, np.uint8, "r"))[8 + length :]
        header.pop("__metadata__", None)
        return {
            name: StoredTensor(
                file, name, tuple(part["shape"]), part["dtype"], data[slice(*part["data_offsets"])]
            )
            for name, part in header.items()
        }


def _indexed(folder: epath.Path) -> dict[str, StoredTensor]:
    index = folder / INDEX
    file_of = read_field(read_json(index, "a Hugging Face checkpoint"), "weight_map", index)
    if not isinstance(file_of, Mapping) or not file_of:
        raise CalmError(f"{index}: weight_map does not map tensors to files")
    for name, file in file_of.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise CalmError(
                f"{index}: tensor {name} is in {file!r}, which is not a file of the folder"
            )
        if not (folder / file).exists():
            raise CalmError(f"{index}: tensor {name} is in {file}, which is missing")
    files = sorted(set(file_of.values()))
    if SINGLE not in files and (folder / SINGLE).exists():
        raise CalmError(f"{folder} has both {SINGLE} and {INDEX} with other files; remove one")
    tensors = {}
    for file in files:
        for name, tensor in open_file(folder / file).items():
            if file_of.get(name) != file:
                raise CalmError(
                    f"{folder / file}: tensor {name} is not in this file, says {INDEX}, but in "
                    f"{file_of.get(name, 'none')}"
                )
            tensors[name] = tensor
    for name, file in file_of.items():
        if name not in tensors:
            raise CalmError(f"{folder / file}: tensor {name} is missing, although {INDEX} lists it")
    return tensors


def _read_config(folder: epath.Path) -> Mapping[str, Any]:
    values = read_json(folder / CONFIG, "a Hugging Face checkpoint")
    kind = kind_of(values)
    if kind == DECODER_RUN:
        raise CalmError(f"{folder} is {kind}; --to=huggingface exports {folder / 'frozen'}")
    if kind in (COMPOSED_RUN, BRIDGE, FROZEN):
        raise CalmError(f"{folder} is {kind}, not a checkpoint of another program")
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise CalmError(
            f"{folder / CONFIG}: architectures is {architectures!r}, not a list of names"
        )
    return values
