"""The bridge's arrays by their names and in their layout in `modeling_calm.CalmForCausalLM`."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm_jax.errors import CalmError
from calm_jax.models import ComposedDecoder
from calm_jax.models.parameters import module_tree
from calm_jax.sharding import on_host


def tensors_of(composed: ComposedDecoder) -> dict[str, np.ndarray]:
    """Every tensor by its name, in float32."""
    tensors = {}
    for module, numbers, stacked in _cross_attentions(composed):
        for name, array in module_tree(module).items():
            arrays = on_host(array) if stacked else [on_host(array)]
            for number, own in zip(numbers, arrays, strict=True):
                tensors[f"bridge.{number}.{_name(name)}"] = _as_in_torch(name, own)
    return tensors


def put_tensors(composed: ComposedDecoder, tensors: Mapping[str, Any], where: str) -> None:
    """Replaces the bridge's arrays by the tensors of `where`.

    Raises `CalmError` if a tensor is missing, unknown or of another shape.
    """
    wanted = tensors_of(composed)
    for name in sorted(wanted.keys() ^ tensors.keys()):
        told = (
            "is missing" if name in wanted else "is not one of the bridge that its config describes"
        )
        raise CalmError(f"{where}: tensor {name} {told}")
    for name, own in wanted.items():
        if own.shape != tensors[name].shape:
            raise CalmError(
                f"{where}: tensor {name} has shape {tuple(tensors[name].shape)}, not {own.shape}"
            )
    for module, numbers, stacked in _cross_attentions(composed):
        tree = {}
        for name, array in module_tree(module).items():
            shape = array.shape[1:] if stacked else array.shape
            arrays = [
                _as_here(name, tensors[f"bridge.{number}.{_name(name)}"][...], shape)
                for number in numbers
            ]
            tree[name] = jnp.stack(arrays) if stacked else jnp.asarray(arrays[0])
        state = nnx.state(module)
        nnx.replace_by_pure_dict(state, tree)
        nnx.update(module, state)


def _cross_attentions(
    composed: ComposedDecoder,
) -> Iterator[tuple[nnx.Module, tuple[int, ...], bool]]:
    """Each module, the numbers of its connections, and whether its arrays are stacked."""
    for round_, modules in zip(composed.plan.rounds, composed.bridge.rounds, strict=True):
        for entry, module in zip(round_.entries, modules, strict=True):
            yield module, tuple(map(composed.connections.index, entry)), round_.stacked


def _name(name: str) -> str:
    if name.endswith("_norm") or name == "gate":
        return name
    return f"{name.removesuffix('_bias')}.bias" if name.endswith("_bias") else f"{name}.weight"


def _as_in_torch(name: str, array: np.ndarray) -> np.ndarray:
    array = np.array(array, np.float32)
    if name.endswith("_bias"):
        return array.reshape(-1)
    if not _name(name).endswith(".weight"):
        return array
    inputs = math.prod(array.shape[: 2 if name == "output" else 1])
    return np.ascontiguousarray(array.reshape(inputs, -1).T)


def _as_here(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    tensor = np.array(tensor, np.float32)
    return (tensor.T if _name(name).endswith(".weight") else tensor).reshape(shape)
