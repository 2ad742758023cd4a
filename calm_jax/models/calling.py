"""Compiled calls of models on their own devices; models with one config share a program."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from calm_jax import sharding


def call(model: nnx.Module, method: str, *arguments: Any) -> Any:
    """`model.method(*arguments)`, compiled; `arguments` are arrays or pytrees of arrays.

    Runs on the devices that hold the model, sharded by the rules if they form a mesh. Models with
    the same config and shapes share one compiled program.
    """
    with on_devices_of(model):
        graphdef, state = nnx.split(model)
        return _call(graphdef, method, state, *arguments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(graphdef, method, state, *arguments):
    return getattr(nnx.merge(graphdef, state), method)(*arguments)


@contextlib.contextmanager
def on_devices_of(holder: nnx.Module | jax.Array) -> Iterator[None]:
    """Makes a device of a model the default one, which decides the attention backend.

    One of the model's arrays may stand for it, which saves the time of finding one.
    """
    array = holder if isinstance(holder, jax.Array) else array_of(holder)
    if array is None:
        yield
        return
    devices = sorted(array.sharding.addressable_devices, key=lambda device: device.id)
    mesh = sharding.automatic(jax.sharding.get_abstract_mesh())
    with jax.default_device(devices[0]), jax.sharding.use_abstract_mesh(mesh):
        yield


def array_of(model: nnx.Module) -> jax.Array | None:
    """The first array of a model; None if its arrays are abstract, or there are none."""
    for array in jax.tree.leaves(nnx.state(model))[:1]:
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
            return array
    return None


@functools.partial(jax.jit, static_argnums=(1, 2), keep_unused=True)
def make_on_mesh_of(array: jax.Array, make: Callable[..., Any], arguments: tuple) -> Any:
    """The arrays `make(*arguments)`, sharded by its constraints on the mesh of `array`.

    `arguments` are hashable; the same function and arguments compile only once.
    """
    with sharding.mesh_of(array):
        return make(*arguments)
