"""The loss as sums: the mean is taken last, so accumulation, packing and sharding stay exact.

Axes: B batch, T position, D model width, V vocabulary.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from calm_jax.models import ComposedDecoder, Decoder, Inputs
from calm_jax.training.cross_entropy import head_loss

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
        key, noise: random noise (see `noisy`) on a decoder's embeddings, or on each tap of a
            composed model; 0: none.
        loss_chunk: positions of each row whose logits exist at once; 0: all of them.

    Returns:
        the sum of weighted cross-entropies in nats, float32; and float32 sums: "loss", "weight",
        "correct" (weighted right tokens), "exact" and "sequences" (segments with every weighted
        token right; all), and for a composed model "connections" [connections, 2].
    """
    inputs, targets_BT = Inputs.of_batch(batch), batch["decoder_target_tokens"]
    segments_BT = inputs.segments_BT
    weights_BT = batch["decoder_loss_weights"] * (segments_BT != 0)

    def perturb(x, *numbers):
        return noisy(x, segments_BT, functools.reduce(jax.random.fold_in, numbers, key), noise)

    x_BTD, connections = model.perturbed(inputs, perturb if noise else None)
    loss, right_BT = head_loss(model, x_BTD, targets_BT, weights_BT, loss_chunk)
    exact, sequences = _sequences(segments_BT, weights_BT > 0, right_BT)
    sums: Sums = {
        "loss": loss,
        "weight": jnp.sum(weights_BT),
        "correct": jnp.sum(weights_BT * right_BT),
        "exact": exact,
        "sequences": sequences,
    }
    if connections:
        sums["connections"] = jnp.stack(connections)
    return loss, jax.lax.stop_gradient(sums)


def noisy(x: jax.Array, segments_BT: jax.Array, key: jax.Array, noise: float) -> jax.Array:
    """Gaussian noise on vectors [B, T, D], of up to `noise` x each vector's own rms.

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
    length = segments_BT.shape[1]

    # Row by row: a scatter over all of them would gather the whole batch on every device.
    @jax.vmap
    def in_segments(segments_T, of_T):
        return jnp.zeros(length + 1, jnp.int32).at[segments_T].add(of_T.astype(jnp.int32))

    counted_BS = in_segments(segments_BT, counted_BT)
    wrong_BS = in_segments(segments_BT, counted_BT & ~right_BT)
    exact = jnp.sum((counted_BS > 0) & (wrong_BS == 0)).astype(jnp.float32)
    return exact, jnp.sum(counted_BS > 0).astype(jnp.float32)
