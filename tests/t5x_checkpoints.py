"""Writes parameters as T5X does, in its layouts, without T5X."""

import tensorstore as ts
from flax import serialization, traverse_util

STATE = {"step": 3, "param_states": {"decoder": {"v_row": "not an array, and not for us"}}}


def nested(tensors):
    return traverse_util.unflatten_dict({tuple(k.split("/")): v for k, v in tensors.items()})


def spec(name, array, *, version=3, driver="file", path_on_top=False, chunks=None):
    """The TensorStore spec that stands in the msgpack file for an array."""
    path = f"target.{name.replace('/', '.')}/"
    store = {"driver": driver}
    if driver == "gcs":
        store["bucket"] = "t5x-dummy-bucket"
    written = {
        "driver": "zarr",
        "dtype": "uint16" if version == 2 and array.dtype.name == "bfloat16" else array.dtype.name,
        "kvstore": store,
        "metadata": {
            "chunks": list(chunks or array.shape),
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(array.shape),
        },
    }
    (written if path_on_top else store)["path"] = path
    return written


def write_zarr(folder, path, array, dtype, chunks, compressor=None):
    kvstore = {"driver": "file", "path": f"{folder}/{path}"}
    metadata = {"shape": array.shape, "chunks": chunks, "compressor": compressor}
    store = ts.open(
        {"driver": "zarr", "dtype": dtype, "kvstore": kvstore, "metadata": metadata}, create=True
    ).result()
    store.write(array.view(dtype) if dtype == "uint16" else array).result()


def write_t5x(folder, tensors, *, apart=(), version=3, **options):
    """Legacy T5X; arrays in `apart` are in the msgpack file itself. Returns `folder`."""
    folder.mkdir(parents=True)
    leaves = {}
    for name, array in tensors.items():
        leaves[name] = array
        if name not in apart:
            leaves[name] = written = spec(name, array, version=version, **options)
            path = written.get("path") or written["kvstore"]["path"]
            metadata = written["metadata"]
            write_zarr(
                folder, path, array, written["dtype"], metadata["chunks"], metadata["compressor"]
            )
    return write_msgpack(folder, leaves, version)


def write_msgpack(folder, leaves, version=3):
    tree = {"version": version, "optimizer": {"target": nested(leaves), "state": STATE}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    return folder


def write_placeholders(folder, tensors):
    """T5X on the Orbax of 2022. Returns `folder`."""
    folder.mkdir(parents=True)
    leaves = {}
    for name, array in tensors.items():
        path = f"_optimizer.target.{name.replace('/', '.')}"
        leaves[name] = f"PLACEHOLDER://{path}"
        write_zarr(folder, f"{path}/", array, array.dtype.name, array.shape)
    tree = {"_optimizer": {"target": nested(leaves), "state": STATE}, "flax_mutables": None}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    return folder


def write_t5x_on_orbax(folder, tensors):
    """T5X on Orbax's CheckpointManager. Returns `folder`."""
    import orbax.checkpoint as ocp

    state = {"step": 3, "param_states": {}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", {"target": nested(tensors), "state": state})
    return folder
