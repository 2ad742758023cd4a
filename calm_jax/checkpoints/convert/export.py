"""Writes a frozen folder as the checkpoint of another program."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tqdm
from etils import epath

from calm_jax.checkpoints import frozen
from calm_jax.checkpoints.chunks import Reader
from calm_jax.checkpoints.convert.family import HuggingFaceFamily
from calm_jax.checkpoints.convert.registry import FAMILIES
from calm_jax.checkpoints.convert.table import Rule, sizes
from calm_jax.checkpoints.files import whole_folder, write_json
from calm_jax.checkpoints.host_arrays import all_finite
from calm_jax.errors import CalmError

FORMATS = ("huggingface",)
SHARD_BYTES = 5 * 10**9  # largest safetensors file, as on the hub
SAFETENSORS = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def export(source: epath.PathLike, target: epath.PathLike, *, to: str = "huggingface") -> None:
    """Writes a frozen folder as config.json, safetensors and tokenizer files for transformers.

    Weights are written one tensor at a time, in the dtype that they were converted from, or in the
    dtype of a model that was trained here.

    Args:
        source: a frozen folder.
        target: a folder that does not exist yet.
        to: "huggingface".

    Raises:
        CalmError: `source` is not a frozen folder or is damaged; no family of transformers computes
            the same as the model; `target` exists or cannot be written.
    """
    if to not in FORMATS:
        raise CalmError(f"--to={to} is unknown; known are {', '.join(FORMATS)}")
    described = frozen.describe(source)
    family, values = _find_family(described)
    vocabulary = described.vocabulary
    # A converted model has the ids from the config.json of its source.
    if described.origin is None and vocabulary is not None:
        values |= {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id}
    tensors = _Tensors(described, family.rules(described.config))
    with whole_folder(target) as folder:
        shards = tensors.in_shards()
        total = sum(tensors.size(name) for names in shards.values() for name in names)
        with tensors.reader, tqdm.tqdm(total=total, unit="B", unit_scale=True) as bar:
            for shard, names in shards.items():
                with (folder / shard).open("wb") as file:
                    for part, data in enumerate(_safetensors(tensors, names)):
                        file.write(data)
                        bar.update(len(data) if part else 0)  # not the header
        if len(shards) > 1:
            shard_of = {name: shard for shard, names in shards.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": shard_of}
            write_json(folder / "model.safetensors.index.json", index)
        if vocabulary is not None:
            vocabulary.save_published(folder)
        write_json(folder / "config.json", {**values, "dtype": tensors.main_dtype})


def _find_family(described: frozen.Description) -> tuple[HuggingFaceFamily, dict[str, Any]]:
    """The family that computes the same as the model, and its config.json.

    A family's config.json describes the model exactly if what is read from it computes the same.
    """
    origin = described.origin or {}
    known = [family for family in FAMILIES.values() if isinstance(family, HuggingFaceFamily)]
    known.sort(key=lambda family: family.name != origin.get("family"))
    model = described.config.as_computed()
    wanted = {**model.to_dict(), "dtype": ""}
    others: list[tuple[int, str]] = []  # how many fields differ, and the first one in words
    for family in known:
        values = family.huggingface_config(model)
        own = origin.get("config") or {}
        # The config of a model with vision does not describe the language model taken from it.
        same = own.get("model_type") == values["model_type"]
        for config in [{**own, **values}] * same + [values]:
            try:
                reading = family.decoder_config(config, "config.json")
            except CalmError:
                continue
            found = {**reading.as_computed().to_dict(), "dtype": ""}
            if found == wanted:
                return family, config
            unlike = [key for key in wanted if found[key] != wanted[key]]
            key = unlike[0]
            both = f"the model has {key} {wanted[key]!r}, {family.name} has {key} {found[key]!r}"
            others.append((len(unlike), f"; {both}"))
    names = ", ".join(family.name for family in known)
    _, nearest = min(others, key=lambda other: other[0], default=(0, ""))
    raise CalmError(f"{described.folder}: none of {names} computes the same as this model{nearest}")


class _Tensors:
    """The tensors to write, by their names in transformers; each is created when it is read."""

    def __init__(self, described: frozen.Description, rules: tuple[Rule, ...]):
        origin = described.origin or {}
        self.main_dtype = origin.get("dtype", described.config.dtype)
        if self.main_dtype not in SAFETENSORS:
            self.main_dtype = described.config.dtype
        self._other_dtypes = origin.get("other_dtypes", {})
        self._config, self._sizes = described.config, sizes(described.config)
        self._rules = {
            name: (rule, layer if rule.per_layer else None)
            for rule in rules
            for layer, name in enumerate(rule.names(self._config.num_layers))
        }
        layout = frozen.layout_of(self._config)
        self._shapes = layout.shapes
        self.reader = Reader(described.folder, layout, described.chunks)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._rules[name][0].source_shape(self._sizes)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._other_dtypes.get(name, self.main_dtype))

    def size(self, name: str) -> int:
        """In bytes."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def in_shards(self) -> dict[str, list[str]]:
        """The names in the order of their layers, by the name of their file."""
        shards: list[list[str]] = [[]]
        filled = 0
        for name in sorted(self._rules, key=lambda name: (self._rules[name][1] or 0, name)):
            if shards[-1] and filled + self.size(name) > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += self.size(name)
        if len(shards) == 1:
            return {"model.safetensors": shards[0]}
        return {
            f"model-{number:05}-of-{len(shards):05}.safetensors": names
            for number, names in enumerate(shards, 1)
        }

    def read(self, name: str) -> np.ndarray:
        """The tensor in the source's layout and dtype."""
        rule, layer = self._rules[name]
        arrays = []
        for held in rule.slices:
            shape = self._shapes[held.target]
            region = tuple(slice(0, size) for size in shape)
            if layer is not None:
                region = (slice(layer, layer + 1), *region[1:])
            (array,) = self.reader.read(held.target, [region])
            arrays.append(array if layer is None else array[0])
        tensor = np.ascontiguousarray(rule.join(arrays, self._sizes)).astype(self.dtype(name))
        if not all_finite(tensor):
            raise CalmError(f"{name} has values too large for {tensor.dtype.name}")
        return tensor


def _safetensors(tensors: _Tensors, names: list[str]) -> Iterator[bytes]:
    """A safetensors file piece by piece: the library needs all tensors in memory at once."""
    header: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        stop = start + tensors.size(name)
        dtype = SAFETENSORS[tensors.dtype(name).name]
        header[name] = {"dtype": dtype, "shape": tensors.shape(name), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield tensors.read(name).tobytes()
