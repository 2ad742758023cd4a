"""Frozen folders: one trained decoder on disk, complete or absent, with every byte checked.

folder/
  config.json    the decoder's config, fingerprint, origin, and a checksum of the file; written last
  chunks.json    a hash of every chunk of the weights (`chunks.Digests`)
  weights/       an Orbax checkpoint: layers stacked [L, ...], names as in the modules
  vocabulary/    what `Vocabulary.save` wrote, if the decoder has one
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from calm_jax.checkpoints.chunk_layout import Layout
from calm_jax.checkpoints.chunks import Digests, Reader, Writer
from calm_jax.checkpoints.files import (
    absolute,
    read_bytes,
    read_field,
    read_json,
    whole_folder,
    write_json,
    write_text,
)
from calm_jax.checkpoints.kinds import BRIDGE, COMPOSED_RUN, DECODER_RUN, FROZEN, kind_of
from calm_jax.checkpoints.sharded_loading import LAYERS, read_leaves
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.errors import CalmError
from calm_jax.models import Decoder, DecoderConfig
from calm_jax.models.lora import lora_in
from calm_jax.models.parameters import Structure, Tree, insert, module_tree, path_name
from calm_jax.models.quantized import QUANTIZERS, quantized_leaves
from calm_jax.presets import is_preset
from calm_jax.sharding import RULES, Rules, on_host

FORMAT = "calm_jax frozen folder, version 3"
STORED_DTYPES = ("float32", "bfloat16")
DTYPES = (*STORED_DTYPES, *QUANTIZERS)


@dataclasses.dataclass(frozen=True)
class Weight:
    """One array of a model, or one layer of an array that stacks layers."""

    path: str  # of the array on disk
    layer: int | None  # its number; None: the whole array
    array: np.ndarray
    name: str = ""  # in messages; "": the path


def save_frozen(decoder: Decoder, target: epath.PathLike, *, vocabulary: Any = None) -> str:
    """Writes a decoder as a frozen folder, with weights in the config's dtype.

    Args:
        decoder: the model.
        target: a folder that does not exist yet.
        vocabulary: a `calm_jax.data.vocabulary.Vocabulary`; default: the decoder's own.

    Returns:
        the fingerprint of config and weights.

    Raises:
        CalmError: `target` exists or cannot be written, or a weight is NaN or infinite.

    See `load` for an example.
    """
    vocabulary = decoder.vocabulary if vocabulary is None else vocabulary
    with whole_folder(target) as folder:
        return write_model(folder, decoder.config, _weights(decoder), vocabulary=vocabulary)


def gather_weights(decoder: Decoder) -> None:
    """The other processes call this while one process saves a decoder that all of them hold."""
    for _ in _weights(decoder):
        pass


def write_model(
    folder: epath.Path,
    config: DecoderConfig,
    weights: Iterable[Weight],
    *,
    vocabulary: Any = None,
    origin: Mapping[str, Any] | None = None,
    check: Callable[["Description"], None] | None = None,
) -> str:
    """Fills an empty folder, as `save_frozen` does, with arrays that are written as they arrive.

    Args:
        weights: every array of the model, each whole or layer by layer.
        origin: where the model came from; JSON values that `describe` returns.
        check: called when all but config.json is written. If it raises, config.json is not written,
            without which the folder is not a model.
    """
    with Writer(folder / "weights", layout_of(config)) as writer:
        for weight in weights:
            writer.add(weight.path, weight.array, layer=weight.layer, name=weight.name)
    write_text(folder / "chunks.json", writer.digests.text())
    files = {}
    if vocabulary is not None:
        vocabulary.save(folder / "vocabulary")
        for file in sorted((folder / "vocabulary").iterdir()):
            files[f"vocabulary/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    values = {
        "format": FORMAT,
        "decoder": config.to_dict(),
        "fingerprint": _identity(config, writer.digests.sha256()),
        "chunks": writer.digests.sha256(),
        "vocabulary": None if vocabulary is None else vocabulary.fingerprint,
        "origin": None if origin is None else dict(origin),
        "files": files,
    }
    if check is not None:
        check(_description(folder, values, vocabulary))
    write_json(folder / "config.json", {**values, "checksum": checksum(values)})
    return values["fingerprint"]


def load(
    target: epath.PathLike, *, mesh: jax.sharding.Mesh | None = None, dtype: str | None = None
) -> Decoder:
    """Loads a frozen folder straight onto the mesh: each device reads its own slice.

    Args:
        target: a folder made by `convert` or `save_frozen`.
        mesh: where the weights go; default: the first device.
        dtype: "float32" or "bfloat16", for weights and computation; "int8": matrices in int8 with a
            float32 scale per output channel, or "int4": with a float16 scale for each 32 weights of
            one, everything else in the stored dtype; default: the stored dtype.

    Raises:
        CalmError: the folder is not a frozen folder, is damaged in any bit that matters, or holds
            arrays that its config does not describe; the dtype is unknown, or a matrix has a size
            that groups of int4 weights do not divide.

    >>> import tempfile
    >>> from flax import nnx
    >>> import calm_jax
    >>> config = calm_jax.DecoderConfig.palm(vocab_size=32, embed_dim=16, num_layers=2, num_heads=2,
    ...                                      head_dim=8, mlp_dim=32)
    >>> folder = tempfile.mkdtemp() + "/decoder"
    >>> fingerprint = calm_jax.save_frozen(calm_jax.Decoder(config, nnx.Rngs(0)), folder)
    >>> decoder = calm_jax.load(folder)
    >>> decoder.config == config, decoder.fingerprint == fingerprint
    (True, True)
    """
    return load_described(describe(target), mesh=mesh, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Description:
    """Everything in a frozen folder except its weights."""

    folder: epath.Path
    config: DecoderConfig
    fingerprint: str  # hash of config and weights
    chunks: str  # SHA-256 of chunks.json
    vocabulary: Any
    origin: Mapping[str, Any] | None


def describe(target: epath.PathLike) -> Description:
    """Describes a frozen folder.

    Raises `CalmError` if it is none, or is damaged, naming the file or key.
    """
    if is_preset(target):
        raise CalmError(
            f"{target} is a preset: sizes without weights, which only `calm plan` uses; name a "
            "frozen folder"
        )
    folder = absolute(target)
    path = folder / "config.json"
    values = read_json(path, "a frozen folder")
    if values.get("format") != FORMAT:
        raise CalmError(_other_kind(folder, values))
    recorded = read_field(values, "checksum", path)
    found = checksum({key: value for key, value in values.items() if key != "checksum"})
    if recorded != found:
        raise CalmError(
            f"{path} is damaged: its checksum is {found[:16]}, not {str(recorded)[:16]}"
        )
    for name, digest in read_field(values, "files", path).items():
        found = hashlib.sha256(read_bytes(folder / name)).hexdigest()
        if found != digest:
            raise CalmError(
                f"{folder / name} is damaged: its SHA-256 is {found[:16]}, not {digest[:16]}"
            )
    vocabulary = None
    for file in (folder / "vocabulary").iterdir() if (folder / "vocabulary").exists() else ():
        if f"vocabulary/{file.name}" not in values["files"]:
            raise CalmError(
                f"{file} is not part of the model: {path.name} does not list it. Remove it"
            )
    if read_field(values, "vocabulary", path) is not None:
        vocabulary = load_vocabulary(folder / "vocabulary")
        if vocabulary.fingerprint != values["vocabulary"]:
            raise CalmError(
                f"{folder / 'vocabulary'} is {vocabulary.fingerprint[:16]}, but the model was "
                f"saved with {values['vocabulary'][:16]}"
            )
    return _description(folder, values, vocabulary)


def _other_kind(folder: epath.Path, values: Mapping[str, Any]) -> str:
    """The message for a folder that is not a frozen folder of this version."""
    kind = kind_of(values)
    refused = f"{folder} is {kind}, not a frozen folder"
    if kind in (COMPOSED_RUN, BRIDGE):
        return (
            f"{refused}; load_composed and export_bridge read it, and it cannot be composed again"
        )
    if kind == DECODER_RUN:
        return f"{refused}; that is {folder / 'frozen'}"
    if kind == FROZEN:
        return (
            f"{folder / 'config.json'}: format is {values['format']!r}, this version reads "
            f"{FORMAT!r}; convert the model again"
        )
    return f"{refused}; make one from it first: calm convert --source={folder} --target=DIR"


def _description(folder: epath.Path, values: Mapping[str, Any], vocabulary: Any) -> Description:
    path = folder / "config.json"
    return Description(
        folder,
        DecoderConfig.from_dict(read_field(values, "decoder", path)),
        read_field(values, "fingerprint", path),
        read_field(values, "chunks", path),
        vocabulary,
        read_field(values, "origin", path),
    )


def load_described(
    described: Description,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
    rules: Rules = RULES,
) -> Decoder:
    """`load` for a folder that is already described; `rules` say how its weights are split."""
    config = described.config
    if dtype is not None and dtype not in DTYPES:
        raise CalmError(f"dtype {dtype!r} is unknown; known are {', '.join(DTYPES)}")
    if dtype in QUANTIZERS:
        config = dataclasses.replace(config, weights=dtype)
    elif dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    structure = _structure(config)
    on_disk = _structure(dataclasses.replace(config, weights=None))
    tree: dict[str, Any] = {}
    with Reader(described.folder, layout_of(described.config), described.chunks) as reader:
        # Quantised layer by layer: a stack of floats would be at least twice the bytes.
        by_layer = on_disk.summed() if config.weights else ()
        shardings = _shardings(on_disk, mesh, rules)
        leaves = read_leaves(reader, on_disk, shardings, config.dtype, by_layer)
        if config.weights:
            places = _shardings(structure, mesh, rules)
            leaves = quantized_leaves(leaves, on_disk, places, config.weights)
        for path, array in leaves:
            insert(tree, path, array)
    decoder = structure.merge(tree)
    decoder.vocabulary, decoder.source = described.vocabulary, str(described.folder)
    decoder.fingerprint = loaded_fingerprint(described, dtype)
    decoder.loaded_dtype = dtype
    return decoder


def _shardings(structure: Structure, mesh: jax.sharding.Mesh | None, rules: Rules) -> Tree:
    """The sharding of every array; without a mesh, the first device."""
    if mesh is not None:
        return structure.shardings(mesh, rules)
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: alone, structure.abstract())


def loaded_fingerprint(described: Description, dtype: str | None) -> str:
    """The fingerprint of a model loaded with `dtype`: a bridge fits its weights in one dtype."""
    if dtype in (None, described.config.dtype):
        return described.fingerprint
    return f"{described.fingerprint} as {dtype}"


def model_fingerprint(decoder: Decoder) -> str:
    """The fingerprint that the decoder was loaded with, or a new decoder's `fingerprint`."""
    return decoder.fingerprint or fingerprint(decoder)


def fingerprint(decoder: Decoder) -> str:
    """A hash of a decoder's config and weights in the config's dtype; the same on every mesh.

    It is the fingerprint of the folder that `save_frozen` would write. It is made from the hashes
    of all chunks, so it depends on how the format splits arrays into chunks.
    """
    layout = layout_of(decoder.config)
    digests = Digests(layout)
    for weight in _weights(decoder):
        for index, data in layout.split(weight.path, weight.array, weight.layer):
            digests.add(weight.path, index, data)
    return _identity(decoder.config, digests.sha256())


@functools.cache
def layout_of(config: DecoderConfig) -> Layout:
    """Paths, shapes and chunks of a decoder's arrays on disk."""
    leaves = jax.tree.leaves_with_path(_structure(config).abstract())
    shapes = {path_name(path): leaf.shape for path, leaf in leaves}
    return Layout(shapes, {path for path in shapes if path.startswith(LAYERS)}, config.dtype)


@functools.cache
def _structure(config: DecoderConfig) -> Structure:
    return Structure(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))


def _weights(decoder: Decoder) -> Iterator[Weight]:
    """A decoder's arrays one by one, stacked arrays layer by layer."""
    if decoder.config.weights is not None:
        raise CalmError(
            f"weights are {decoder.config.weights}, rounded while they were loaded; use the folder "
            "that they were loaded from"
        )
    if lora_in(decoder) is not None:
        raise CalmError("the decoder has a separate low-rank update; merge it first")
    for path, array in jax.tree.leaves_with_path(module_tree(decoder)):
        name = path_name(path)
        if not name.startswith(LAYERS):
            yield Weight(name, None, on_host(array))
            continue
        for layer in range(len(array)):
            yield Weight(name, layer, on_host(array[layer]))


def _identity(config: DecoderConfig, chunks: str) -> str:
    """A model's fingerprint; it covers the config, which changes what weights compute."""
    return checksum({"decoder": config.to_dict(), "chunks": chunks})


def checksum(values: Mapping[str, Any]) -> str:
    """SHA-256 of values of JSON, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
