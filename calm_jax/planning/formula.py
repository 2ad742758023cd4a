"""What a step needs, by arithmetic alone: accurate enough to rank ways of running it.

FLOPs, and bytes kept for the backward pass, are counted in the traced step; sizes of trees come
from their shardings. Everything else is estimated from the sizes of the largest arrays: gathered
weights, the residual stream, the products inside a layer, attention logits.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from calm_jax import sharding
from calm_jax.models.config import DecoderConfig, heads
from calm_jax.models.connections import plan_connections
from calm_jax.models.parameters import size_in_bytes
from calm_jax.planning import compiled_plan, counting, roofline
from calm_jax.planning.compiled_plan import Plan
from calm_jax.planning.topologies import Topology
from calm_jax.training.abstract_run import abstract_parts, decoder_configs, own_lengths
from calm_jax.training.costs import shard_bytes, tree_shards
from calm_jax.training.optimizer import make_optimizer
from calm_jax.training.run_model import composition_configs
from calm_jax.training.step import Shardings

_BLOCK = 512  # keys whose logits exist at once, unless the attention backend is "xla"


@dataclasses.dataclass(frozen=True)
class _Layers:
    """Equal layers that run one after another, on one chip and for one micro-batch."""

    number: int  # how many layers there are
    learns: bool  # whether a gradient flows through them
    weights: float  # bytes of one layer, gathered
    stream: float  # bytes of the residual stream over the whole length
    inner: float  # bytes of the products that one layer computes
    logits: float  # bytes of the attention logits that exist at once, in float32
    exchanges: int  # how often one pass over a layer exchanges the stream along `tensor`

    @property
    def working(self) -> float:
        """Bytes while a layer runs: its weights and the next one's, streams, products."""
        runs = 2 if self.learns else 1
        return 2 * self.weights + runs * (2 * self.stream + self.inner + self.logits)

    def passes(self, remat: str) -> int:
        if not self.learns:
            return 1
        return 2 if remat == "none" else 3


class Formula:
    """The formulas for one config's models, on any mesh of one topology.

    Raises `CalmError` if its devices do not support the config's `attention` or `train.remat`.
    """

    def __init__(self, config: ConfigDict, topology: Topology):
        self.topology = topology
        self.configs = decoder_configs(config)
        self.own_lengths = own_lengths(config)
        self.parts = abstract_parts(config, topology.device)
        self.trainable, self.frozen = self.parts.abstract()
        self.optimizer, _ = make_optimizer(
            config.optimizer, config.train.num_steps, self.parts.structure.projections()
        )
        self.opt_state = jax.eval_shape(self.optimizer.init, self.trainable)
        self.composed = config.kind == "composed"
        self.compositions = composition_configs(config) if self.composed else []
        # Trained layers are float32, and are cast before they are gathered.
        self.cast = jnp.dtype(self.configs[0].dtype).itemsize / 4
        self._counted: dict[tuple[str, int, int], tuple[int, int]] = {}
        self._trees = functools.cache(self._count_trees)

    def plan(self, config: ConfigDict, mesh: jax.sharding.AbstractMesh) -> Plan:
        """As `calm_jax.planning.compiled_plan.make_plan`, without its collectives.

        Raises:
            CalmError: the mesh does not divide heads, widths or the batch.
        """
        train, chip = config.train, self.topology.chip
        sharding.check_batch(train.batch_size, train.accumulate, mesh)
        trees, trained, gradients = self._trees(mesh, config.weight_sharding)
        state = sum(tree["bytes"] for tree in trees)
        tensor, batch_ways = mesh.shape["tensor"], mesh.size // mesh.shape["tensor"]
        rows = train.batch_size / train.accumulate / batch_ways
        groups = self._groups(config, rows, tensor)
        flops, kept = self._count(config)
        kept = kept / tensor / batch_ways / train.accumulate
        head = self._head_bytes(config, rows, tensor)
        peak = (
            state
            # Gradients, their sum over micro-batches, and trained weights in the compute dtype.
            + trained * (1.5 + (train.accumulate > 1))
            + kept
            + max(head, *(group.working for group in groups))
        )
        shards = mesh.shape["fsdp"] * (mesh.shape["data"] if config.weight_sharding == "all" else 1)
        gathered = exchanged = moved = 0.0
        for group in groups:
            runs = train.accumulate * group.number * group.passes(train.remat)
            gathered += runs * group.weights * (shards - 1) / shards
            exchanged += runs * group.exchanges * group.stream * (tensor - 1) / tensor
            moved += runs * (2 * group.weights + 4 * group.stream + 4 * group.inner + group.logits)
        moved += 3 * train.accumulate * head + 6 * trained + kept
        # Every micro-batch sums its gradients: first scattered in the way the weights are split,
        # then over chips of a slice that hold the same weights, then each chip's share over slices.
        slices = mesh.shape["slices"]
        replicas = batch_ways // slices // shards
        gradients *= train.accumulate
        gathered += gradients * (shards - 1)
        summed = 2 * gradients * (replicas - 1) / replicas
        links = (
            gathered / self._bandwidth(shards)
            + summed / self._bandwidth(replicas)
            + exchanged / self._bandwidth(tensor)
        )
        network = 2 * gradients / replicas * (slices - 1) / slices / chip.network_bandwidth
        flops = flops / self.topology.chips
        seconds = roofline.step_time(self.topology, flops, moved, links, network)
        return {
            **compiled_plan.description(config, self.topology, dict(mesh.shape), self.own_lengths),
            "compiled": False,
            "memory": {
                "trees": trees,
                "available": chip.hbm_bytes,
                "peak": round(peak),
                "fits": peak <= chip.hbm_bytes,
            },
            "flops": flops,
        } | compiled_plan.times(config, self.topology, seconds, self.own_lengths)

    def _count_trees(
        self, mesh: jax.sharding.AbstractMesh, weight_sharding: str
    ) -> tuple[list[dict[str, Any]], int, float]:
        """Rows of all trees; bytes of the trained tree and of its gradients, on one chip."""
        rules = sharding.WEIGHT_RULES[weight_sharding]
        shardings = Shardings.of(self.parts, self.optimizer, mesh, rules)
        rows = tree_shards(self.parts, shardings, self.trainable, self.opt_state, self.frozen)
        trained = shard_bytes(self.trainable, shardings.trainable)
        layers, split = self.trainable, shardings.trainable
        if not self.composed:  # an embedding's gradient is float32, but a layer's is cast
            layers, split = layers["layers"], split["layers"]
        return rows, trained, trained - (1 - self.cast) * shard_bytes(layers, split)

    def _groups(self, config: ConfigDict, rows: float, tensor: int) -> list[_Layers]:
        T = config.data.length
        sizes = functools.partial(_layers, tensor=tensor)

        def row(length: int) -> dict[str, float]:
            keys = length if config.attention == "xla" else min(length, _BLOCK)
            return {"tokens": rows * length, "keys": keys}

        if not self.composed:
            (decoder,) = self.configs
            weights = size_in_bytes(self.trainable["layers"]) / decoder.num_layers
            return [sizes(decoder, decoder.num_layers, True, weights * self.cast, **row(T))]
        anchor, *augments = self.configs
        connected = plan_connections(
            self.compositions, anchor.num_layers, [augment.num_layers for augment in augments]
        )
        weights = size_in_bytes(self.frozen["anchor"]["layers"]) / anchor.num_layers
        below = connected.connections[0].anchor_layer + 1
        groups = [
            sizes(anchor, below, False, weights, **row(T)),
            sizes(anchor, anchor.num_layers - below, True, weights, **row(T)),
        ]
        lengths = [own or T for own in self.own_lengths]
        for tree, augment, taps, length in zip(
            self.frozen["augments"].values(), augments, connected.tap_layers, lengths, strict=True
        ):
            weights = size_in_bytes(tree["layers"]) / augment.num_layers
            groups.append(sizes(augment, taps[-1] + 1, False, weights, **row(length)))
        number = len(connected.connections)
        weights = size_in_bytes(self.trainable) / number * self.cast
        N, H = heads(self.compositions[0], anchor)
        crossing = DecoderConfig.palm(
            vocab_size=1,
            embed_dim=anchor.embed_dim,
            num_layers=number,
            num_heads=N,
            num_kv_heads=N,
            head_dim=H,
            mlp_dim=1,
        )
        # Keys and values are as long as the longest augment's row.
        return [*groups, sizes(crossing, number, True, weights, **row(max(T, *lengths)))]

    def _head_bytes(self, config: ConfigDict, rows: float, tensor: int) -> float:
        """Bytes of a chunk's logits, of their gradient, and of the gathered embedding."""
        decoder, T = self.configs[0], config.data.length
        positions = min(config.train.loss_chunk or T, T)
        logits = rows * positions * decoder.vocab_size / tensor * 4
        return 2.5 * logits + decoder.vocab_size / tensor * decoder.embed_dim * 2

    def _bandwidth(self, ways: int) -> float:
        """Bytes per second to a group of chips, along one side of the slice or along two."""
        sides = sorted(
            (self.topology.side_bandwidth(side), length)
            for side, length in enumerate(self.topology.shape)
        )
        several = [band for band, length in sides if length > 1] or [sides[0][0]]
        return sum(several[: 1 if ways <= max(self.topology.shape) else 2])

    def _count(self, config: ConfigDict) -> tuple[int, int]:
        key = (config.train.remat, config.train.batch_size, config.data.length)
        if key not in self._counted:
            self._counted[key] = counting.flops(config), counting.kept_bytes(config)
        return self._counted[key]


def _layers(
    config: DecoderConfig,
    number: int,
    learns: bool,
    weights: float,
    *,
    tokens: float,
    tensor: int,
    keys: int,
) -> _Layers:
    kv_ways = tensor if config.num_kv_heads % tensor == 0 else 1
    features = 2 * config.num_heads * config.head_dim / tensor
    features += 2 * config.num_kv_heads * config.head_dim / kv_ways
    features += (3 if config.gated_mlp else 2) * config.mlp_dim / tensor
    return _Layers(
        number=number,
        learns=learns,
        weights=weights / tensor,
        stream=2 * tokens * config.embed_dim,
        inner=2 * tokens * features,
        logits=4 * tokens * config.num_heads / tensor * keys,
        exchanges=2 if config.block == "parallel" else 4,
    )


def abstract_mesh(sizes: Mapping[str, int]) -> jax.sharding.AbstractMesh:
    """A mesh without devices, of the given size along every axis."""
    return jax.sharding.AbstractMesh(
        tuple(sizes[axis] for axis in sharding.MESH_AXES), sharding.MESH_AXES
    )


def mesh_of(config: ConfigDict, topology: Topology) -> jax.sharding.AbstractMesh:
    """The config's mesh over the chips of a topology.

    Raises:
        CalmError: as `calm_jax.sharding.make_mesh`.
    """
    return abstract_mesh(sharding.mesh_sizes(config.mesh, topology.chips, topology.slices))
