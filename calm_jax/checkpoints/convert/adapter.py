"""Plain LoRA adapters of PEFT, merged into their base model while it is converted.

A folder holds `adapter_config.json` and, for each adapted matrix W [O, I] of the base model, the
tensors `lora_A.weight` [R, I] and `lora_B.weight` [O, R]; merged, the matrix is W + scaling · B A.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from calm_jax.checkpoints.convert import huggingface_config as read
from calm_jax.checkpoints.convert.family import Family, HuggingFaceFamily, Reading
from calm_jax.checkpoints.files import ADAPTER_CONFIG, absolute, read_json
from calm_jax.checkpoints.sources import huggingface, torch_file
from calm_jax.checkpoints.sources.source import Computed, Tensor
from calm_jax.errors import CalmError

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
_COPY = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer(?P<leaf>\.weight|\.bias)")
_BLOCK_ROWS = 4096  # rows of a matrix that are merged at a time
# Keys of adapter_config.json that are read here, or that do not change what is merged. Any other
# key must be absent or off: it could belong to an adapter that is not plain.
_PLAIN_KEYS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora",
}  # fmt: skip
# Other initialisations change the base model as well.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def merge_adapter(reading: Reading, family: Family, adapter: epath.PathLike) -> Reading:
    """The reading of a base model with the adapter in the folder `adapter` merged into its tensors.

    Each tensor is merged when it is read, and becomes float32, since bfloat16 cannot hold the sum.

    Raises:
        CalmError: the folder has no adapter, or the adapter is damaged, is not a plain LoRA
            adapter, or does not fit the base model; the message names the key or tensor.
    """
    folder = absolute(adapter)
    path = folder / ADAPTER_CONFIG
    config = read_json(path, "an adapter of PEFT")
    if not isinstance(family, HuggingFaceFamily):
        raise CalmError(f"{folder} adapts models of transformers, not of the family {family.name}")
    where = str(path)
    _check_plain(config, where)
    pairs, copies = _read_tensors(folder)
    _check_copies(copies, reading, family, str(folder))
    num_layers = reading.config.num_layers
    matrices = {name for rule in reading.rules for name in rule.names(num_layers)}
    adapted = {family.tensor_name(f"{module}.weight"): module for module in pairs}
    _check_complete(config, matrices - set(adapted), pairs, where)
    tensors = dict(reading.tensors)
    for name, module in adapted.items():
        if any(entry.must == "anything" and entry.matches(name) for entry in reading.unused):
            continue  # belongs to a part that is not converted, such as Gemma 3's vision tower
        if name not in matrices or name not in tensors:
            raise CalmError(f"{folder}: module {module} is not a matrix of the base model")
        rank, scaling = _rank_and_scaling(config, module, where)
        a_RI, b_OR = pairs[module]
        base, shapes = tuple(tensors[name].shape), (tuple(a_RI.shape), tuple(b_OR.shape))
        if len(base) != 2 or shapes != ((rank, base[1]), (base[0], rank)):
            raise CalmError(
                f"{folder}: module {module} has lora_A {shapes[0]} and lora_B {shapes[1]}, which "
                f"with rank {rank} do not fit {base} in the base model"
            )
        tensors[name] = merged(tensors[name], a_RI, b_OR, scaling)
    return dataclasses.replace(reading, tensors=tensors)


def merged(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Computed:
    """A matrix of the base model with its adapter, merged when it is read."""
    shape, dtype = tuple(base.shape), np.promote_types(base.dtype, np.float32)

    def values() -> np.ndarray:
        base_OI = base[...]
        a_RI, b_OR = (x[...].astype(np.float32) for x in (a, b))
        merged_OI = np.empty(shape, dtype)
        for start in range(0, len(merged_OI), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            merged_OI[rows] = base_OI[rows] + scaling * (b_OR[rows] @ a_RI)
        return merged_OI

    return Computed(shape, dtype, values)


def _check_plain(config: Mapping[str, Any], where: str) -> None:
    """Raises `CalmError` naming the first key of an adapter that is not a plain LoRA adapter."""
    read.choice(config, "peft_type", where, {"LORA": None})
    read.refuse(config, where, "task_type", None, "CAUSAL_LM")
    read.refuse(config, where, "bias", "none")
    read.refuse(config, where, "init_lora_weights", *_PLAIN_STARTS)
    for key, value in config.items():
        if key not in _PLAIN_KEYS and value:
            read.refuse(config, where, key)


def _read_tensors(
    folder: epath.Path,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """lora_A and lora_B of every adapted module, by its name in the base model; and the tensors of
    the base model that PEFT copies into the file if it adapts a head."""
    file = next((folder / name for name in _FILES if (folder / name).exists()), None)
    if file is None:
        raise CalmError(f"{folder} has no {' or '.join(_FILES)}")
    is_pickled = file.suffix == ".bin"
    tensors = torch_file.read(file).tensors if is_pickled else huggingface.open_file(file)
    found: dict[str, dict[str, Tensor]] = {}
    copies = {}
    for name, tensor in tensors.items():
        match, copy = _TENSOR.fullmatch(name), _COPY.fullmatch(name)
        if np.dtype(tensor.dtype).name not in ("float16", "bfloat16", "float32"):
            raise CalmError(f"{file}: tensor {name} is {tensor.dtype}, which is not supported")
        if match is not None:
            found.setdefault(match["module"], {})[match["matrix"]] = tensor
        elif copy is not None:
            copies[copy["module"] + copy["leaf"]] = tensor
        else:
            raise CalmError(f"{file}: tensor {name} is not part of a plain LoRA adapter")
    if not found:
        raise CalmError(f"{file} adapts nothing: it has no lora_A and lora_B")
    for module, matrices in found.items():
        for matrix in {"A", "B"} - set(matrices):
            raise CalmError(f"{file}: module {module} has no lora_{matrix}")
    return {module: (matrices["A"], matrices["B"]) for module, matrices in found.items()}, copies


def _check_copies(
    copies: Mapping[str, Tensor], reading: Reading, family: HuggingFaceFamily, where: str
) -> None:
    """Raises `CalmError` naming a copied tensor that differs from the base model's."""
    for name, copy in copies.items():
        base = reading.tensors.get(family.tensor_name(name))
        if base is None or not np.array_equal(
            copy[...].astype(np.float32), base[...].astype(np.float32)
        ):
            raise CalmError(
                f"{where}: its copy of {name} differs from the base model's; wrong base?"
            )


def _check_complete(
    config: Mapping[str, Any], not_adapted: Collection[str], modules: Iterable[str], where: str
) -> None:
    """Raises `CalmError` naming a target for which the file lacks some or all matrices."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return  # a regular expression, or "all-linear"
    parts = ("exclude_modules", "layers_to_transform", "layers_pattern")
    for target in targets:
        ending = f".{target}"
        if not any(f".{module}".endswith(ending) for module in modules):
            raise CalmError(f"{where}: target_modules has {target!r}, which no tensor adapts")
        for name in sorted(not_adapted):
            module = name.removesuffix(".weight")
            if f".{module}".endswith(ending) and not any(config.get(part) for part in parts):
                raise CalmError(
                    f"{where}: target_modules has {target!r}, but no tensor adapts {module}"
                )


def _rank_and_scaling(config: Mapping[str, Any], module: str, where: str) -> tuple[int, float]:
    """The rank of a module's adapter, and the factor on its product."""
    rank, alpha = (
        {key: _by_pattern(config, pattern, module, config.get(key, 8), where)}
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    r = read.whole_number(rank, "r", where)
    scale = r**0.5 if read.boolean(config, "use_rslora", where, False) else r
    return r, read.number(alpha, "lora_alpha", where) / scale


def _by_pattern(config: Mapping[str, Any], key: str, module: str, default: Any, where: str) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT matches them."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise CalmError(f"{where}: {key} is {patterns!r}; it must be an object")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CalmError(f"{where}: {key} has {pattern!r}: {error}") from None
    return default
