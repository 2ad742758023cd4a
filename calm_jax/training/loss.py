"""The loss as sums: the mean is taken last, so accumulation, packing and sharding stay exact.

Axes: B batch, T position, D model width, V vocabulary.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from calm_jax import sharding
from calm_jax.models import ComposedDecoder, Decoder

Batch = Mapping[str, jax.Array]
Sums = dict[str, jax.Array]


def loss_sums(
    model: Decoder | ComposedDecoder,
    batch: Batch,
    key: jax.Array | None = None,
    noise: float = 0.0,
    loss_chunk: int = 0,
) -> tuple[jax.Array, Sums]:
    """Weighted sums over one batch.

    Args:
        batch: arrays [B, T] under seqio's decoder keys.
        key, noise: random noise (see `noisy`) on a decoder's embeddings, or on the taps of a
            composed model; 0: none.
        loss_chunk: positions of each row whose logits exist at once; 0: all of them.

    Returns:
        the sum of weighted cross-entropies in nats, float32; and float32 sums: "loss", "weight",
        "correct" (weighted right tokens), "exact" and "sequences" (segments with every weighted
        token right; all), and for a composed model "connections" [connections, 2].
    """
    tokens_BT, targets_BT = batch["decoder_input_tokens"], batch["decoder_target_tokens"]
    positions_BT, segments_BT = batch["decoder_positions"], batch["decoder_segment_ids"]
    weights_BT = batch["decoder_loss_weights"] * (segments_BT != 0)
    sums: Sums = {}
    if isinstance(model, ComposedDecoder):

        def perturb(tap, augment, layer):
            tap_key = jax.random.fold_in(jax.random.fold_in(key, augment), layer)
            return noisy(tap, segments_BT, tap_key, noise)

        prompt_mask_BT = batch["decoder_causal_attention"]
        x_BTD, norms = model.bridged(
            tokens_BT, positions_BT, segments_BT, prompt_mask_BT, perturb if noise else None
        )
        sums["connections"] = jnp.stack(norms)
    else:
        x_BTD = model.embed(tokens_BT)
        if noise:
            x_BTD = noisy(x_BTD, segments_BT, key, noise)
        x_BTD = model.hidden(x_BTD, positions_BT, segments_BT)
    loss, right_BT = head_loss(model, x_BTD, targets_BT, weights_BT, loss_chunk)
    exact, sequences = _sequences(segments_BT, weights_BT > 0, right_BT)
    sums |= {
        "loss": loss,
        "weight": jnp.sum(weights_BT),
        "correct": jnp.sum(weights_BT * right_BT),
        "exact": exact,
        "sequences": sequences,
    }
    return loss, jax.lax.stop_gradient(sums)


def head_loss(
    model: Decoder | ComposedDecoder,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Final norm, head and weighted cross-entropy of a residual stream, in chunks of its length.

    A chunk's gradient is taken as soon as its loss is known, so its logits are computed once and
    never kept, neither forward nor backward.

    Returns:
        the sum of weighted cross-entropies, float32; and bool [B, T], whether the largest logit is
        that of the target.
    """
    B, T = targets_BT.shape
    if not 0 < chunk < T:
        return _loss_of_logits(model.logits(x_BTD), targets_BT, weights_BT)
    trained = nnx.Nothing() if isinstance(model, ComposedDecoder) else _in_head
    decoder = model.anchor if isinstance(model, ComposedDecoder) else model
    graphdef, head, rest = nnx.split(decoder, trained, ...)
    chunks = -(-T // chunk)

    def in_chunks(x):
        """[B, T, ...] as [chunks, B, chunk, ...], every length whole on its devices."""
        x = sharding.constrain(x, "batch", "length", *[None] * (x.ndim - 2))
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - T)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)

    def whole(x):
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
        return total, whole(right)

    def loss_and_gradients(head, x_BTD):
        def step(totals, chunk):
            x_BCD, *rest = chunk
            (loss, right_BC), gradients = jax.value_and_grad(
                loss_of_chunk, argnums=(0, 1), has_aux=True
            )(head, x_BCD, *rest)
            return jax.tree.map(jnp.add, totals, (loss, gradients[0])), (right_BC, gradients[1])

        zeros = (0.0, jax.tree.map(jnp.zeros_like, head))
        (total, head_gradient), (right, x_gradient) = jax.lax.scan(
            step, zeros, (in_chunks(x_BTD), targets, weights)
        )
        return (total, whole(right)), (head_gradient, whole(x_gradient))

    def scaled(gradients, cotangents):
        return jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), gradients)

    loss.defvjp(loss_and_gradients, scaled)
    return loss(head, x_BTD)


def _loss_of_logits(logits_BTV, targets_BT, weights_BT) -> tuple[jax.Array, jax.Array]:
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    return jnp.sum(weights_BT * losses_BT), jnp.argmax(logits_BTV, axis=-1) == targets_BT


def _in_head(path, _) -> bool:
    """Whether a decoder's logits depend on a parameter but through the residual stream."""
    return path[0] in ("final_norm", "embedding", "head", "head_bias")


def noisy(x: jax.Array, segments_BT: jax.Array, key: jax.Array, noise: float) -> jax.Array:
    """Gaussian noise on vectors [..., B, T, D], of up to `noise` x each vector's own rms.

    Its strength is drawn for each sequence. An anchor trained so reads vectors that are not exactly
    one of its embeddings, which is what a bridge will give it; a bridge trained so finds what the
    taps of all keys have in common.
    """
    B, T = segments_BT.shape
    strength_key, normal_key = jax.random.split(key)
    x_f32 = jax.lax.stop_gradient(x).astype(jnp.float32)
    rms = jnp.sqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True))
    strength_BS = noise * jax.random.uniform(strength_key, (B, T + 1))
    strength_BT = jnp.take_along_axis(strength_BS, segments_BT, axis=1)
    normal = jax.random.normal(normal_key, x.shape)
    return x + (strength_BT[:, :, None] * rms * normal).astype(x.dtype)


def means(sums: Sums) -> dict[str, jax.Array]:
    """Metrics of summed batches: "loss" (nats a token), "accuracy", "exact", "connection/k"."""
    weight = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
    metrics = {
        "loss": sums["loss"] / weight,
        "accuracy": sums["correct"] / weight,
        "exact": sums["exact"] / jnp.maximum(sums["sequences"], 1.0),
        "tokens": sums["weight"],
    }
    for k, (result, stream) in enumerate(sums.get("connections", ())):
        metrics[f"connection/{k}"] = jnp.sqrt(result / jnp.maximum(stream, 1e-30))
    return metrics


def _sequences(segments_BT, counted_BT, right_BT) -> tuple[jax.Array, jax.Array]:
    """How many segments have every counted token right, and how many have one to count."""
    B, T = segments_BT.shape
    rows_B1 = jnp.arange(B)[:, None]
    zeros_BS = jnp.zeros((B, T + 1), jnp.int32)
    counted_BS = zeros_BS.at[rows_B1, segments_BT].add(counted_BT.astype(jnp.int32))
    wrong_BS = zeros_BS.at[rows_B1, segments_BT].add((counted_BT & ~right_BT).astype(jnp.int32))
    exact = jnp.sum((counted_BS > 0) & (wrong_BS == 0)).astype(jnp.float32)
    return exact, jnp.sum(counted_BS > 0).astype(jnp.float32)
