"""The training step of a config, compiled for devices that you need not have.

Models are only shapes; no weight is read or created.
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
from jax.experimental import topologies as jax_topologies
from ml_collections import ConfigDict

from calm_jax import sharding
from calm_jax.data.dataset import own_keys
from calm_jax.errors import CalmError
from calm_jax.models.parts import Parts
from calm_jax.planning.topologies import Topology
from calm_jax.training.abstract_run import abstract_run, own_lengths
from calm_jax.training.fitting import compile_lowered
from calm_jax.training.step import BATCH_KEYS, Shardings, make_train_step

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced step, with the shapes and shardings of its arguments."""

    mesh: Mesh
    parts: Parts
    shardings: Shardings
    arguments: tuple[Any, ...]
    traced: Any


def use_no_device() -> None:
    """Keeps this process off any accelerator. Call it before JAX runs anything."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # else libtpu asks the network what machine this is
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"  # the lock guards a device; none is used
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
            platform="tpu", topology_name=f"{topology.chip.name}:{topology.shape_name}", **several
        ).devices


def trace(config: ConfigDict, mesh: Mesh) -> Program:
    """Traces the step for a config, on a mesh of devices or an abstract one.

    Raises:
        CalmError: `calm train` would also refuse the models, connections, mesh or batch.
    """
    sharding.check_batch(config.train.batch_size, config.train.accumulate, mesh)
    abstract = isinstance(mesh, jax.sharding.AbstractMesh)
    device = jax.devices("cpu")[0] if abstract else mesh.devices.flat[0]
    run = abstract_run(config, mesh, device)
    step = make_train_step(
        run.parts,
        run.optimizer,
        run.shardings,
        schedule=run.schedule,
        accumulate=config.train.accumulate,
        seed=config.train.seed,
        noise=config.train.noise,
        loss_chunk=config.train.loss_chunk,
    )
    rows = (config.train.batch_size, config.data.length)
    batch = {
        key: jax.ShapeDtypeStruct(rows, jnp.float32 if "weights" in key else jnp.int32)
        for key in BATCH_KEYS
    }
    for number, length in enumerate(own_lengths(config)):
        if length is not None:
            own = jax.ShapeDtypeStruct((config.train.batch_size, length), jnp.int32)
            batch |= dict.fromkeys(own_keys(number), own)
    arguments = (*run.trees(), batch, jax.ShapeDtypeStruct((), jnp.int32))
    with jax.sharding.use_abstract_mesh(mesh) if abstract else jax.set_mesh(mesh):
        return Program(mesh, run.parts, run.shardings, arguments, step.trace(*arguments))


def compile_program(program: Program) -> tuple[jax.stages.Compiled, str]:
    """The compiled step, and its text.

    The compiler itself writes the text, because JAX cannot read back every program.

    Raises:
        TooLarge: the compiler finds no way to fit the step in memory.
    """
    device = program.mesh.devices.flat[0]
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(program.mesh), _silent_stderr():
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = compile_lowered(program.traced.lower(), device, options)
        (text,) = pathlib.Path(folder).glob("*train_step*.after_optimizations.txt")
        return compiled, text.read_text()


@contextlib.contextmanager
def _silent_stderr():
    """Hides the compiler's warnings that this machine has no TPU."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
