"""The training step: `train_step(trainable, opt_state, frozen, batch, step)`.

`calm_jax.models.parts` decides what is trained. The frozen tree is never differentiated, donated or
passed to the optimizer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from calm_jax import sharding
from calm_jax.models.parameters import Tree
from calm_jax.models.parts import Parts
from calm_jax.training.loss import Sums, loss_sums, means

BATCH_KEYS = (
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_loss_weights",
    "decoder_positions",
    "decoder_segment_ids",
    "decoder_causal_attention",
)


@dataclasses.dataclass(frozen=True)
class Shardings:
    """The shardings of the step's arguments."""

    trainable: Tree
    opt_state: Any
    frozen: Tree
    batch: jax.sharding.NamedSharding  # of every array
    replicated: jax.sharding.NamedSharding

    @classmethod
    def of(
        cls,
        parts: Parts,
        optimizer: optax.GradientTransformation,
        mesh: jax.sharding.Mesh,
        rules: sharding.Rules = sharding.RULES,
    ) -> "Shardings":
        trainable, frozen = parts.shardings(mesh, rules)
        replicated = sharding.replicated(mesh)
        abstract, _ = parts.abstract()

        def sharding_of(x, param, sharding):
            if isinstance(x, optax.MaskedNode):  # a parameter of another part of the optimizer
                return x
            # Moments have their parameter's shape; Adafactor's factors do not, and are small.
            return sharding if x.shape == param.shape else replicated

        opt_state = optax.tree_map_params(
            optimizer,
            sharding_of,
            jax.eval_shape(optimizer.init, abstract),
            abstract,
            trainable,
            transform_non_params=lambda _: replicated,
            is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        )
        return cls(trainable, opt_state, frozen, sharding.batch_sharding(mesh), replicated)


def make_train_step(
    parts: Parts,
    optimizer: optax.GradientTransformation,
    shardings: Shardings,
    *,
    schedule: optax.Schedule,
    accumulate: int = 1,
    seed: int = 0,
    noise: float = 0.0,
    loss_chunk: int = 0,
) -> Callable[..., tuple[Tree, Any, dict[str, jax.Array]]]:
    """The jitted step, which donates its first two arguments.

    Args:
        schedule: the learning rate by step, for the metrics; the optimizer counts steps itself.
        accumulate: micro-batches per step; gradients are weighted by tokens, so the result equals
            that of the whole batch.
        seed: together with the step's number, the source of all randomness in the step.
        noise: see `calm_jax.training.loss.noisy`.
        loss_chunk: see `calm_jax.training.loss.loss_sums`.

    Returns:
        `train_step(trainable, opt_state, frozen, batch, step) -> (trainable, opt_state, metrics)`.
    """

    def sums_and_gradients(trainable, frozen, batch, key):
        def loss(trainable):
            return loss_sums(parts.merge(trainable, frozen), batch, key, noise, loss_chunk)

        (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        return sums, gradients

    def train_step(trainable, opt_state, frozen, batch, step):
        key = jax.random.fold_in(jax.random.key(seed), step)
        if accumulate == 1:
            sums, gradients = sums_and_gradients(trainable, frozen, batch, key)
        else:
            sums, gradients = _accumulated(
                lambda micro, key: sums_and_gradients(trainable, frozen, micro, key),
                batch,
                key,
                accumulate,
            )
        weight = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        updates, opt_state = optimizer.update(gradients, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        metrics = means(sums) | {
            "grad_norm": optax.tree.norm(gradients),
            # Of parameters after the update, as in a checkpoint; loss and gradient are from before.
            "parameter_norm": optax.tree.norm(trainable),
            "learning_rate": schedule(step),
        }
        return trainable, opt_state, metrics

    return jax.jit(
        train_step,
        in_shardings=(
            shardings.trainable,
            shardings.opt_state,
            shardings.frozen,
            shardings.batch,
            shardings.replicated,
        ),
        out_shardings=(shardings.trainable, shardings.opt_state, shardings.replicated),
        donate_argnums=(0, 1),
    )


def make_eval_step(
    parts: Parts, shardings: Shardings, *, loss_chunk: int = 0
) -> Callable[..., Sums]:
    """The jitted sums of one validation batch: `eval_step(trainable, frozen, batch) -> sums`."""

    def eval_step(trainable, frozen, batch):
        return loss_sums(parts.merge(trainable, frozen), batch, loss_chunk=loss_chunk)[1]

    return jax.jit(
        eval_step,
        in_shardings=(shardings.trainable, shardings.frozen, shardings.batch),
        out_shardings=shardings.replicated,
    )


def _accumulated(sums_and_gradients, batch, key, accumulate: int):
    """Sums and gradients over micro-batches, one after another."""

    def micro_batches(x):
        # Rows r, r + accumulate, ... form a micro-batch, so that no row changes its device.
        x = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2))

    def step(totals, inputs):
        index, micro = inputs
        result = sums_and_gradients(micro, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, totals, result), None

    batch = jax.tree.map(micro_batches, batch)
    first = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums_and_gradients, first, key)
    )
    return jax.lax.scan(step, zeros, (jnp.arange(accumulate), batch))[0]
