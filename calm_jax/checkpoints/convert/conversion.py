"""Turns a checkpoint of any supported family into a frozen folder, tensor by tensor."""

import collections
import dataclasses
import functools
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tqdm
from etils import epath

from calm_jax.checkpoints.convert.adapter import merge_adapter
from calm_jax.checkpoints.convert.family import Reading
from calm_jax.checkpoints.convert.registry import find_family
from calm_jax.checkpoints.convert.table import check_names, check_shapes, check_unused, sizes
from calm_jax.checkpoints.convert.verification import verify_model
from calm_jax.checkpoints.files import ADAPTER_CONFIG, absolute, refuse_lfs_pointer, whole_folder
from calm_jax.checkpoints.frozen import STORED_DTYPES, Weight, write_model
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.checkpoints.sources.source import Source
from calm_jax.data.vocabularies import token_maps, vocabulary_of_folder
from calm_jax.errors import CalmError

EXACT = {"bfloat16": "bfloat16", "float16": "float32", "float32": "float32", "float64": None}
log = logging.getLogger("absl")


def convert(
    source: epath.PathLike,
    target: epath.PathLike,
    *,
    format: str = "auto",
    dtype: str | None = None,
    adapter: epath.PathLike | None = None,
    verify: bool = False,
    **family_options: Any,
) -> None:
    """Writes a frozen folder with the weights, the config and the vocabulary of a checkpoint.

    Tensors are read one at a time. The host holds one tensor, and a few chunks (of at most 8 MiB)
    that wait to be written, with the tensors that they are views of.

    Args:
        source: a Hugging Face folder · a T5X checkpoint · an Orbax tree · a .gguf, .npz, .pt or
            .safetensors file.
        target: a folder that does not exist yet.
        format: the name of the family; "auto" recognises it.
        dtype: "float32" or "bfloat16", the dtype of stored weights; default: the smallest that
            holds the source exactly, for a quantised source float32.
        adapter: the folder of a plain LoRA adapter that PEFT saved; it is merged into the weights.
        verify: also compute logits of a few prompts from the new folder, record them in it, and
            compare them with transformers' if it is installed and reads the source.
        family_options: facts that the checkpoint does not show; `calm convert --help` lists them.

    Raises:
        CalmError: the source is damaged or of an unsupported family; a tensor is missing, unknown,
            not finite, or not of the config's shape; an option is unknown; the adapter is not plain
            or does not fit; `target` exists or cannot be written; the logits differ. Nothing is
            left behind.

    >>> import tempfile
    >>> import numpy as np
    >>> import calm_jax
    >>> tree = {"decoder/token_embedder/embedding": (32, 16), "decoder/decoder_norm/scale": (16,),
    ...         "decoder/layers_0/layer_norm/scale": (16,),
    ...         "decoder/layers_0/q_wi_fused/kernel": (16, 2, 40),
    ...         "decoder/layers_0/kv_fused/kernel": (16, 1, 16),
    ...         "decoder/layers_0/o_wo_fused/kernel": (2, 24, 16)}
    >>> folder = tempfile.mkdtemp()
    >>> np.savez(folder + "/palm.npz", **{k: np.zeros(v, np.float32) for k, v in tree.items()})
    >>> calm_jax.convert(folder + "/palm.npz", folder + "/palm")
    >>> calm_jax.load(folder + "/palm").config.mlp_dim
    32
    """
    if dtype is not None and dtype not in STORED_DTYPES:
        raise CalmError(f"--dtype={dtype} is unknown; known are {', '.join(STORED_DTYPES)}")
    with whole_folder(target) as folder:
        opened = open_source(source)
        if opened.kind == "gguf":
            from calm_jax.checkpoints.convert.gguf_model import as_published

            opened = as_published(opened)
        family = find_family(opened, format)
        for name in family_options:
            if name not in family.options:
                known = ", ".join(family.options) or "none"
                raise CalmError(f"{name} is not an option of {family.name}; known are {known}")
        reading = family.read(opened, **family_options)
        if adapter is not None:
            reading = merge_adapter(reading, family, adapter)
        elif (opened.path / ADAPTER_CONFIG).exists():
            raise CalmError(
                f"{opened.path} holds a model and an adapter; give --adapter={opened.path} to "
                f"merge it, or move {ADAPTER_CONFIG} away"
            )
        for warning in reading.warnings:
            log.warning("%s: %s", opened.path, warning)
        where = str(opened.path)
        check_names(
            reading.rules, reading.unused, reading.config.num_layers, reading.tensors, where
        )
        check_shapes(reading.rules, reading.config, reading.tensors, where)
        check_unused(reading.unused, reading.tensors, where)
        dtypes = _source_dtypes(reading, where)
        stored = dtype or _exact_dtype(dtypes, where)
        config = dataclasses.replace(reading.config, dtype=stored)
        vocabulary = _vocabulary(opened)
        if vocabulary is not None:
            vocabulary.check_rows(config.vocab_size, where)
        origin = {
            "source": where,
            "family": family.name,
            "dtype": collections.Counter(dtypes.values()).most_common(1)[0][0],
            "config": None if opened.config is None else dict(opened.config),
            "adapter": None if adapter is None else str(absolute(adapter)),
        }
        origin["other_dtypes"] = {k: v for k, v in dtypes.items() if v != origin["dtype"]}
        weights = _weights(reading, opened)
        check = functools.partial(verify_model, source=opened, adapter=adapter) if verify else None
        write_model(folder, config, weights, vocabulary=vocabulary, origin=origin, check=check)


def _weights(reading: Reading, source: Source) -> Iterator[Weight]:
    """Every tensor of the source, once, split into our arrays."""
    config = reading.config
    names = [(line, n) for line in reading.rules for n in line.names(config.num_layers)]
    total = sum(_size(reading.tensors[n]) for _, n in names if n in reading.tensors)
    axes = sizes(config)
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=source.path.name) as bar:
        for line in reading.rules:
            for layer, name in enumerate(line.names(config.num_layers)):
                if name in reading.tensors:
                    tensor = reading.tensors[name][...]
                    bar.update(tensor.nbytes)
                else:
                    value = np.float32(line.absent)
                    tensor = np.broadcast_to(value, line.source_shape(axes))
                for target, array in line.split(tensor, axes):
                    yield Weight(target, layer if line.per_layer else None, array, name)
                del tensor


def _size(tensor: Any) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _source_dtypes(reading: Reading, where: str) -> dict[str, str]:
    """The dtype of every tensor that is read. Raises `CalmError` naming one that is not a float."""
    dtypes = {}
    for line in reading.rules:
        for name in line.names(reading.config.num_layers):
            if name in reading.tensors:
                dtypes[name] = np.dtype(reading.tensors[name].dtype).name
                if dtypes[name] not in EXACT:
                    raise CalmError(
                        f"{where}: tensor {name} is {dtypes[name]}; weights must be floats"
                    )
    return dtypes


def _exact_dtype(dtypes: Mapping[str, str], where: str) -> str:
    """The smallest dtype that holds every tensor exactly."""
    if "float64" in dtypes.values():
        raise CalmError(f"{where} holds float64, which is not stored exactly; choose a --dtype")
    exact = "float32" if "float32" in map(EXACT.get, dtypes.values()) else "bfloat16"
    found = collections.Counter(dtypes.values())
    if exact == "float32" and set(found) != {"float32"}:
        listed = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in found.most_common())
        log.warning(
            "%s holds %s: stored as float32 to keep every bit; --dtype=bfloat16 halves it",
            where,
            listed,
        )
    return exact


def _vocabulary(source: Source) -> Any:
    """The vocabulary of a folder, or of a file that holds one; for any other file, the only one in
    its folder, which may belong to another model."""
    if source.vocabulary_files is not None:
        return _vocabulary_within(source)
    path = source.path
    folder = path if path.is_dir() else path.parent
    files = token_maps(folder)
    names = ", ".join(file.name for file in files)
    if path != folder and len(files) > 1:
        log.warning("%s is converted without a vocabulary: its folder has %s", path, names)
        return None
    for file in files:
        refuse_lfs_pointer(file)
    if path != folder and files:
        log.warning("%s is converted with the vocabulary in its folder, %s", path, names)
    vocabulary = vocabulary_of_folder(folder)
    if path == folder and vocabulary is None:
        log.warning("%s is converted without a vocabulary: it has no tokenizer file", path)
        if (folder / "vocab.txt").exists():
            log.warning("vocab.txt is not one; AutoTokenizer of transformers writes tokenizer.json")
    return vocabulary


def _vocabulary_within(source: Source) -> Any:
    if not source.vocabulary_files:
        log.warning("%s is converted without a vocabulary: it holds none", source.path)
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name, data in source.vocabulary_files.items():
            (epath.Path(folder) / name).write_bytes(data)
        try:
            return vocabulary_of_folder(folder)
        except CalmError as error:  # its message names a temporary file
            raise CalmError(str(error).replace(folder, str(source.path))) from error
