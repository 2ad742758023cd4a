"""The real training step of a config, compiled for devices that need not be there.

Models are shapes alone; no weight is read or made.
"""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies as jax_topologies
from ml_collections import ConfigDict

from calm_jax import sharding
from calm_jax.checkpoints import frozen
from calm_jax.errors import CalmError
from calm_jax.models import Decoder, DecoderConfig, compose
from calm_jax.models.parameters import path_name
from calm_jax.models.published import form, is_form
from calm_jax.models.quantized import SCALE
from calm_jax.planning.fitting import compile_lowered
from calm_jax.planning.topologies import Topology
from calm_jax.training.optimizer import make_optimizer
from calm_jax.training.run_model import (
    composition_configs,
    decoder_config,
    frozen_dtypes,
    set_execution,
)
from calm_jax.training.step import BATCH_KEYS, Parts, Shardings, make_train_step

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced step: what it is called with, where that lives, and its equations."""

    mesh: Mesh
    parts: Parts
    shardings: Shardings
    arguments: tuple[Any, ...]
    traced: Any


def use_no_device() -> None:
    """Keeps this process from any accelerator; to be called before anything runs."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # else it asks the network what machine this is
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"  # the lock is of a device; none is used
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")


def devices(topology: Topology) -> list[Any]:
    """The devices of a TPU topology, to compile for.

    Raises:
        CalmError: the TPU's compiler is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise CalmError(
            "the TPU's compiler is not installed; `pip install calm_jax[plan]` installs libtpu"
        )
    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    with _silent_stderr():
        return jax_topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{topology.chip.name}:{topology.shape_name}",
            **several,
        ).devices


def forms(config: ConfigDict) -> list[DecoderConfig]:
    """Of a decoder, or of the anchor and every augment, as `calm train` would load them.

    Raises:
        CalmError: a folder that is missing or damaged, or an unknown form.
    """
    if config.kind != "composed":
        source = config.decoder["from"]
        given = frozen.describe(source).config if source else decoder_config(config)
        return [dataclasses.replace(given, weights=None)]
    places = (config.anchor, *config.augments)
    return [
        _cast(form(place) if is_form(place) else frozen.describe(place).config, dtype)
        for place, dtype in zip(places, frozen_dtypes(config), strict=True)
    ]


def trace(config: ConfigDict, mesh: Mesh) -> Program:
    """Traces the step for a config, on a mesh of devices or an abstract one.

    Raises:
        CalmError: bad input, as `calm train` would find it: forms, connections, mesh, batch.
    """
    sharding.check_batch(config.train.batch_size, config.train.accumulate, mesh)
    abstract = isinstance(mesh, jax.sharding.AbstractMesh)
    device = jax.devices("cpu")[0] if abstract else mesh.devices.flat[0]
    parts = abstract_parts(config, device)
    optimizer, schedule = make_optimizer(config.optimizer, config.train.num_steps)
    rules = sharding.WEIGHT_RULES[config.weight_sharding]
    shardings = Shardings.of(parts, optimizer, mesh, rules)
    step = make_train_step(
        parts,
        optimizer,
        shardings,
        schedule=schedule,
        accumulate=config.train.accumulate,
        seed=config.train.seed,
        noise=config.train.noise,
        loss_chunk=config.train.loss_chunk,
    )
    trainable, frozen_tree = parts.abstract()
    rows = (config.train.batch_size, config.data.length)
    batch = {
        key: jax.ShapeDtypeStruct(rows, jnp.float32 if "weights" in key else jnp.int32)
        for key in BATCH_KEYS
    }
    arguments = (
        trainable,
        jax.eval_shape(optimizer.init, trainable),
        frozen_tree,
        batch,
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    with jax.sharding.use_abstract_mesh(mesh) if abstract else jax.set_mesh(mesh):
        return Program(mesh, parts, shardings, arguments, step.trace(*arguments))


def compile_program(program: Program) -> tuple[jax.stages.Compiled, str]:
    """The compiled step, and its text.

    The compiler writes the text: what it makes for some chips is more than JAX can read back.

    Raises:
        TooLarge: the compiler finds no way to fit it in memory.
    """
    device = program.mesh.devices.flat[0]
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(program.mesh), _silent_stderr():
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = compile_lowered(program.traced.lower(), device, options)
        (text,) = pathlib.Path(folder).glob("*train_step*.after_optimizations.txt")
        return compiled, text.read_text()


def abstract_parts(config: ConfigDict, device: jax.Device) -> Parts:
    """The model of a config as shapes, computed as the config asks and such a device allows.

    Raises:
        CalmError: the device cannot do what `attention` or `train.remat` says.
    """
    if config.kind != "composed":
        (model,) = _decoders(forms(config), jnp.float32)
    else:
        compositions = composition_configs(config)

        def make():
            anchor, *augments = _decoders(forms(config), None)
            return compose(anchor, augments, compositions, rngs=nnx.Rngs(0))

        model = nnx.eval_shape(make)
    set_execution(model, config, device)
    return Parts(model)


def _decoders(configs: list[DecoderConfig], dtype) -> list[Decoder]:
    """Decoders without values, stored as a frozen folder is loaded: in `dtype`, or their own."""

    def make(config: DecoderConfig) -> Decoder:
        decoder = Decoder(config, nnx.Rngs(0))
        nnx.update(
            decoder,
            jax.tree.map_with_path(
                lambda path, x: x if _as_it_is(path, x) else x.astype(dtype or config.dtype),
                nnx.state(decoder),
            ),
        )
        return decoder

    return [nnx.eval_shape(lambda config=config: make(config)) for config in configs]


def _as_it_is(path, x: jax.Array) -> bool:
    """Of an int8 matrix, its integers and scales."""
    return x.dtype == jnp.int8 or path_name(path).removesuffix("/value").endswith(SCALE)


def _cast(config: DecoderConfig, dtype: str | None) -> DecoderConfig:
    if dtype == "int8":
        return dataclasses.replace(config, weights=dtype)
    return config if dtype is None else dataclasses.replace(config, dtype=dtype)


@contextlib.contextmanager
def _silent_stderr():
    """Without the compiler's warnings that this machine has no TPU."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
