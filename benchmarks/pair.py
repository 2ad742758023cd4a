"""A pair of models with random weights, and the real training step of a bridge between them.

Nothing here reads a file, so TensorFlow, seqio and Orbax stay unloaded.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from measuring import Clock
from ml_collections import ConfigDict

from calm_jax import sharding
from calm_jax.data.dataset import own_keys
from calm_jax.models import CompositionConfig, Decoder, DecoderConfig, compose
from calm_jax.models.attention_choice import Need, choose
from calm_jax.models.execution import REMAT as POLICIES
from calm_jax.models.execution import Execution
from calm_jax.models.parameters import module_tree
from calm_jax.models.parts import Parts
from calm_jax.planning.ideal import IdealFlops, ideal_flops
from calm_jax.training.optimizer import make_optimizer
from calm_jax.training.step import Shardings, make_train_step

OPTIMIZER = ConfigDict(
    {
        "name": "adamw",
        "learning_rate": 1e-4,
        "schedule": "constant",
        "warmup_steps": 0,
        "final_fraction": 0.0,
        "weight_decay": 0.0,
        "b1": 0.9,
        "b2": 0.999,
        "clip_norm": 1.0,
    }
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """What one step computes, whoever computes it; `length` in tokens a row."""

    anchor: DecoderConfig
    augment: DecoderConfig
    composition: CompositionConfig
    batch_size: int
    length: int

    def ideal(self) -> IdealFlops:
        """FLOPs of a step with attention at its full square."""
        return ideal_flops(
            self.anchor, [self.augment], [self.composition], self.batch_size, self.length
        )

    def ideal_causal(self) -> int:
        """FLOPs of a step with half the square, which is all that a causal mask needs."""
        # Rows of half the length, twice as many: as many tokens, attention half of it.
        return ideal_flops(
            self.anchor, [self.augment], [self.composition], 2 * self.batch_size, self.length // 2
        ).total

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.length


def _pair(anchor, augment, *, vocab_size, dtype, batch_size, length) -> Pair:
    """`anchor`, `augment`: layers, width, heads, key heads, head width, MLP width."""
    names = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
    configs = [
        DecoderConfig.llama(
            vocab_size=vocab_size, dtype=dtype, **dict(zip(names, sizes, strict=True))
        )
        for sizes in (anchor, augment)
    ]
    # Nothing starts at zero: products with zeros draw less power, and a chip would run faster.
    return Pair(*configs, CompositionConfig(init="paper"), batch_size, length)


SIZES = {
    "tiny": _pair(
        (4, 32, 4, 2, 8, 48), (4, 16, 2, 1, 8, 24),
        vocab_size=64, dtype="float32", batch_size=2, length=16,
    ),
    "small": _pair(
        (12, 512, 8, 8, 64, 1408), (8, 256, 8, 2, 32, 704),
        vocab_size=4096, dtype="float32", batch_size=4, length=256,
    ),
    # What is compiled alone, for TPU slices: small, but every shard is a real one.
    "scaling": _pair(
        (8, 1024, 16, 16, 64, 4096), (8, 512, 8, 2, 64, 2048),
        vocab_size=8192, dtype="bfloat16", batch_size=16, length=1024,
    ),
    # Llama 2 7B (arXiv 2307.09288) and TinyLlama 1.1B (arXiv 2401.02385), of one vocabulary.
    "h200": _pair(
        (32, 4096, 32, 32, 128, 11008), (22, 2048, 32, 4, 64, 5632),
        vocab_size=32_000, dtype="bfloat16", batch_size=8, length=2048,
    ),
}  # fmt: skip

SIZE = flags.DEFINE_enum("size", "small", list(SIZES), "of both models, their batch and dtype")
BATCH = flags.DEFINE_integer("batch", None, "rows a step, instead of the size's own")
LENGTH = flags.DEFINE_integer("length", None, "tokens a row, instead of the size's own")
STEPS = flags.DEFINE_integer("steps", 5, "that are measured, after two that are not")
ATTENTION = flags.DEFINE_string("attention", "auto", "calm_jax's backend of attention")
LOSS_CHUNK = flags.DEFINE_integer("loss_chunk", 256, "positions whose logits exist at once; 0: all")
REMAT = flags.DEFINE_enum("remat", "none", POLICIES, "what the backward pass computes again")
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice to compile for, such as v5e:4x4")
OUTPUT = flags.DEFINE_string("output", None, "JSON file of the results")


def chosen() -> Pair:
    """The pair that the flags name."""
    pair = SIZES[SIZE.value]
    return dataclasses.replace(
        pair, batch_size=BATCH.value or pair.batch_size, length=LENGTH.value or pair.length
    )


def mesh_of(topology: str | None, shape: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh of `shape` on a TPU slice, only to compile for; without one, of one device here."""
    if topology is None:
        return sharding.make_mesh({}, jax.devices()[:1])
    from calm_jax.planning import program, topologies  # needs the TPU's compiler

    program.use_no_device()
    return sharding.make_mesh(shape, program.devices(topologies.find(topology)))


class RandomStep:
    """The training step of a pair on a mesh.

    Attributes:
        parts: how the composed model's arrays fall into a trainable and a frozen tree.
        step: `calm_jax.training.step.make_train_step`'s.
        backend: of the anchor's attention.
        own_tokens: whether the augment's tokens are given apart from the anchor's.
        mesh: what it is compiled for; set it (`jax.set_mesh`) around lowering and calls.
    """

    def __init__(
        self,
        pair: Pair,
        mesh: jax.sharding.Mesh,
        *,
        attention: str = "auto",
        remat: str = "none",
        packed: bool = False,
        loss_chunk: int = 0,
        accumulate: int = 1,
        own_tokens: bool = False,
    ):
        self.pair, self.mesh, self.packed, self.own_tokens = pair, mesh, packed, own_tokens

        def execution(need: Need, remat: str) -> Execution:
            device = mesh.devices.flat[0]
            backend = choose(attention, device, need, length=pair.length, packed=packed)
            return Execution(attention=backend, remat=remat)

        model = nnx.eval_shape(self._model)
        model.anchor.execution = execution(Need.of_decoder("the anchor", pair.anchor), remat)
        model.augments[0].execution = execution(
            Need.of_decoder("the augment", pair.augment), "none"
        )
        model.execution = execution(Need.of_bridge(pair.composition, pair.anchor), remat)
        self.backend = model.anchor.execution.attention
        self.parts = Parts(model)
        self.optimizer, schedule = make_optimizer(OPTIMIZER, 1000, {})
        self.shardings = Shardings.of(self.parts, self.optimizer, mesh)
        self.step = make_train_step(
            self.parts,
            self.optimizer,
            self.shardings,
            schedule=schedule,
            accumulate=accumulate,
            loss_chunk=loss_chunk,
        )

    def abstract(self) -> tuple[Any, ...]:
        """The step's arguments as shapes with their shardings."""
        shardings = self.shardings
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(self._arguments),
            (
                shardings.trainable,
                shardings.opt_state,
                shardings.frozen,
                dict.fromkeys(self._batch(), shardings.batch),
                shardings.replicated,
            ),
        )

    def arguments(self) -> tuple[Any, ...]:
        """The step's arguments with random values, each made on the devices that hold it."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract())
        return sharding.init_sharded(self._arguments, shardings)

    def compile(self) -> jax.stages.Compiled:
        """The step, compiled for the mesh's devices, which need not be here."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(*self.abstract()).compile()

    def _model(self):
        pair = self.pair
        anchor, augment = Decoder(pair.anchor, nnx.Rngs(0)), Decoder(pair.augment, nnx.Rngs(1))
        return compose(anchor, augment, pair.composition, rngs=nnx.Rngs(2))

    def _batch(self) -> dict[str, np.ndarray]:
        batch = random_batch(self.pair, self.packed)
        return batch | own_tokens_of(batch) if self.own_tokens else batch

    def _arguments(self):
        trainable, frozen = self.parts.split(module_tree(self._model()))
        frozen = jax.tree.map(lambda x: x.astype(self.pair.anchor.dtype), frozen)
        batch = jax.tree.map(jnp.asarray, self._batch())
        return trainable, self.optimizer.init(trainable), frozen, batch, jnp.int32(0)


def peak_bytes(compiled: jax.stages.Compiled, mesh: jax.sharding.Mesh) -> int:
    """What a step holds at its peak on each device, its arguments included."""
    memory = compiled.memory_analysis()
    if mesh.devices.flat[0].platform == "cpu":  # whose peak leaves temporaries out
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return memory.peak_memory_in_bytes


def seconds_a_step(compiled, arguments, steps: int) -> float:
    """Median seconds, after two steps that warm up; the loss must be a number."""
    trainable, opt_state, *rest = arguments
    seconds = []
    for _ in range(2 + steps):
        with Clock() as clock:
            trainable, opt_state, metrics = jax.block_until_ready(
                compiled(trainable, opt_state, *rest)
            )
        seconds.append(clock.seconds)
    if not jnp.isfinite(metrics["loss"]):
        raise FloatingPointError(f"the loss is {metrics['loss']}")
    return statistics.median(seconds[2:])


def random_batch(pair: Pair, packed: bool = False) -> dict[str, np.ndarray]:
    """Rows of random tokens, every one to be predicted; one sequence each, `packed` two."""
    random, shape = np.random.default_rng(0), (pair.batch_size, pair.length)
    tokens, targets = random.integers(1, pair.anchor.vocab_size, (2, *shape)).astype(np.int32)
    positions = np.arange(pair.length, dtype=np.int32)
    first = pair.length // 2 if packed else pair.length
    return {
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones(shape, np.float32),
        "decoder_positions": np.broadcast_to(positions % first, shape),
        "decoder_segment_ids": np.broadcast_to(1 + positions // first, shape),
        "decoder_causal_attention": np.zeros(shape, np.int32),
    }


def own_tokens_of(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tokens as an augment's own."""
    tokens, segments = batch["decoder_input_tokens"], batch["decoder_segment_ids"]
    order = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    rest = (batch["decoder_positions"], batch["decoder_causal_attention"])
    return dict(zip(own_keys(0), (tokens, segments, order, *rest), strict=True))
