"""Cross-entropy of a residual stream, without holding the logits of a whole batch.

Axes: B batch, T position, C position in a chunk, D model width, V vocabulary.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from calm_jax import sharding
from calm_jax.models import ComposedDecoder, Decoder
from calm_jax.models.layouts import residual_layout
from calm_jax.models.parameters import SCALE


def head_loss(
    model: Decoder | ComposedDecoder,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Final norm, head and weighted cross-entropy of a residual stream, in chunks of its length.

    A chunk's gradient is computed together with its loss, so its logits are computed only once and
    never stored for the backward pass.

    Args:
        x_BTD: the residual stream [B, T, D].
        targets_BT: int32 [B, T].
        weights_BT: float32 [B, T].
        chunk: positions of each row in a chunk; 0: all.

    Returns:
        the sum of weighted cross-entropies, float32; and bool [B, T], whether the target has the
        largest logit.
    """
    B, T = targets_BT.shape
    if not 0 < chunk < T:
        return _loss_of_logits(model.logits(x_BTD), targets_BT, weights_BT)
    graphdef, head, rest = nnx.split(model.anchor, _in_head, ...)
    # Gathered once: without the barrier XLA would gather it for every chunk.
    head = jax.lax.optimization_barrier(jax.tree.map(_gathered, head, is_leaf=_is_variable))
    chunks = -(-T // chunk)

    def in_chunks(x):
        """[B, T, ...] as [chunks, B, chunk, ...], with the length gathered first."""
        x = sharding.constrain(x, "batch", "length", *[None] * (x.ndim - 2))
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - T)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)

    def joined(x):
        """The inverse of `in_chunks`."""
        return x.swapaxes(0, 1).reshape(B, chunks * chunk, *x.shape[3:])[:, :T]

    targets, weights = in_chunks(targets_BT), in_chunks(weights_BT)

    def loss_of_chunk(head, x_BCD, targets_BC, weights_BC):
        logits_BCV = nnx.merge(graphdef, head, rest).logits(x_BCD)
        return _loss_of_logits(logits_BCV, targets_BC, weights_BC)

    @jax.custom_vjp
    def loss(head, x_BTD):
        def step(total, chunk):
            loss, right_BC = loss_of_chunk(head, *chunk)
            return total + loss, right_BC

        total, right = jax.lax.scan(step, 0.0, (in_chunks(x_BTD), targets, weights))
        return total, joined(right)

    def loss_and_gradients(head, x_BTD):
        # Skip the gradient of a frozen head: it would cost as much as the logits of every chunk.
        trained = any(leaf.perturbed for leaf in jax.tree.leaves(head, is_leaf=_is_primal))
        head = jax.tree.map(lambda leaf: leaf.value, head, is_leaf=_is_primal)
        wanted = (0, 1) if trained else (1,)

        def step(totals, chunk):
            x_BCD, *rest = chunk
            (loss, right_BC), (*head_gradient, x_gradient) = jax.value_and_grad(
                loss_of_chunk, argnums=wanted, has_aux=True
            )(head, x_BCD, *rest)
            return jax.tree.map(jnp.add, totals, (loss, head_gradient)), (right_BC, x_gradient)

        zeros = (0.0, [jax.tree.map(jnp.zeros_like, head)] if trained else [])
        (total, head_gradient), (right, x_gradient) = jax.lax.scan(
            step, zeros, (in_chunks(x_BTD.value), targets, weights)
        )
        gradients = (head_gradient[0] if trained else None, residual_layout(joined(x_gradient)))
        return (total, joined(right)), gradients

    def scaled(gradients, cotangents):
        return jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), gradients)

    loss.defvjp(loss_and_gradients, scaled, symbolic_zeros=True)
    return loss(head, x_BTD)


def _loss_of_logits(logits_BTV, targets_BT, weights_BT) -> tuple[jax.Array, jax.Array]:
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    return jnp.sum(weights_BT * losses_BT), jnp.argmax(logits_BTV, axis=-1) == targets_BT


def _in_head(path, _) -> bool:
    """Whether `Decoder.logits` reads this parameter."""
    return path[0].removesuffix(SCALE) in ("final_norm", "embedding", "head", "head_bias")


def _gathered(variable: nnx.Variable) -> nnx.Variable:
    """The variable with its value gathered along the model's width."""
    axes = (axis if axis == "vocab" else None for axis in variable.get_metadata("axes"))
    return variable.replace(sharding.constrain(variable.get_value(), *axes))


def _is_variable(x) -> bool:
    return isinstance(x, nnx.Variable)


def _is_primal(x) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
