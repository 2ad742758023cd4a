"""Arrays on disk that TensorStore reads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from calm_jax.checkpoints.files import explained, is_bucket

# Caches the nodes of OCDBT's B-tree, which all arrays of a folder share.
_CONTEXT = {"cache_pool#ocdbt": {"total_bytes_limit": 10**8}}
_ERRORS = (ValueError, OSError, RuntimeError)  # of TensorStore


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """An array that is open but not yet read; see `Tensor`."""

    store: ts.TensorStore
    name: str  # in messages: the checkpoint and the tensor
    dtype: np.dtype  # of the values; if the store's differs, bits are reinterpreted

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Raises `CalmError` if a chunk is absent or damaged."""
        with explained(f"{self.name} cannot be read", _ERRORS):
            return np.asarray(self.store[index].read().result()).view(self.dtype)


def zarr_spec(
    folder: epath.Path, path: str, *, driver: str = "zarr", ocdbt: bool = False
) -> dict[str, Any]:
    """TensorStore spec of the array at `path` in a folder; driver "zarr" (version 2) or "zarr3".

    A missing chunk is an error: writers of checkpoints store every chunk, and a lost file must not
    be read as zeros.
    """
    kvstore = f"{folder}/" if is_bucket(folder) else {"driver": "file", "path": f"{folder}/"}
    if ocdbt:
        kvstore = {"driver": "ocdbt", "base": kvstore, "cache_pool": "cache_pool#ocdbt"}
    kvstore = ts.KvStore.Spec(kvstore) / f"{path.strip('/')}/"
    return {"driver": driver, "kvstore": kvstore.to_json(), "fill_missing_data_reads": False}


def open_all(
    specs: Mapping[str, Mapping[str, Any]], where: str, *, bfloat16_as_uint16: bool = False
) -> dict[str, StoredTensor]:
    """Opens the arrays of a checkpoint, all at once; no weight is read.

    With `bfloat16_as_uint16`, arrays of uint16 hold the bits of bfloat16. Raises `CalmError` if an
    array is missing, damaged, or contradicts its spec; `where` names the checkpoint.
    """
    context = ts.Context(_CONTEXT)
    opening, tensors = {}, {}
    for name, spec in specs.items():
        with explained(f"{where}: tensor {name} cannot be opened", _ERRORS):
            opening[name] = ts.open(spec, context=context, open=True, read=True)
    for name, future in opening.items():
        called = f"{where}: tensor {name}"
        with explained(f"{called} cannot be opened", _ERRORS):
            store = future.result()
        dtype = store.dtype.numpy_dtype
        if bfloat16_as_uint16 and dtype == np.uint16:
            dtype = ts.bfloat16.numpy_dtype
        tensors[name] = StoredTensor(store, called, dtype)
    return tensors
