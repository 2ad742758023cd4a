"""The loss as sums over tokens. Means are taken last, so accumulation and packing stay exact.

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
        batch: arrays [B, T] with seqio's decoder keys, and those of augments with own tokens.
        key, noise: noise (see `noisy`) on a decoder's embeddings or a composed model's taps; 0:
            none.
        loss_chunk: positions of each row whose logits exist at once; 0: all.

    Returns:
        the sum of weighted cross-entropies in nats, float32; and float32 sums: that "loss", the
        "weight" of all tokens, the weight of "correct" ones, the number of "sequences" with a
        prompt and weight and of "exact" ones (all their weighted tokens correct), and for a
        composed model "connections" [connections, 2] (see `ComposedDecoder.perturbed`).
    """
    inputs, targets_BT = Inputs.of_batch(batch), batch["decoder_target_tokens"]
    segments_BT = inputs.segments_BT
    weights_BT = batch["decoder_loss_weights"] * (segments_BT != 0)

    def perturb(x, *numbers):
        own = inputs.of_augment(numbers[0]) if numbers else None
        return noisy(
            x,
            segments_BT if own is None else own.segments_BT,
            functools.reduce(jax.random.fold_in, numbers, key),
            noise,
            most=segments_BT.shape[1],
        )

    x_BTD, connections = model.perturbed(inputs, perturb if noise else None)
    loss, right_BT = head_loss(model, x_BTD, targets_BT, weights_BT, loss_chunk)
    # The first token of a sequence has the mask of a prompt even if it is plain text.
    prompt_BT = (inputs.prompt_mask_BT == 1) & (inputs.positions_BT > 0)
    exact, sequences = _sequences(segments_BT, prompt_BT, weights_BT > 0, right_BT)
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


def noisy(
    x: jax.Array, segments_BT: jax.Array, key: jax.Array, noise: float, most: int | None = None
) -> jax.Array:
    """Vectors [B, T, D] with Gaussian noise of up to `noise` times each vector's own rms.

    The strength is drawn for each sequence. Noise teaches an anchor to read vectors near its
    embeddings, which a bridge will give it, and a bridge to read what many similar taps share.

    Args:
        segments_BT: int32 [B, T].
        most: the largest number of a segment; default: T.
    """
    most = segments_BT.shape[1] if most is None else most
    strength_key, normal_key = jax.random.split(key)
    x_f32 = jax.lax.stop_gradient(x).astype(jnp.float32)
    rms = jnp.sqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True))
    strength_BS = noise * jax.random.uniform(strength_key, (len(x), most + 1))
    strength_BT = jnp.take_along_axis(strength_BS, segments_BT, axis=1)
    normal = jax.random.normal(normal_key, x.shape)
    return x + (strength_BT[:, :, None] * rms * normal).astype(x.dtype)


def means(sums: Sums) -> dict[str, jax.Array]:
    """Metrics of the sums of one batch or several, as float32 scalars.

    They are "loss" (nats per token), "accuracy", "exact" (of "sequences", those with a prompt),
    "tokens" (their weight), and for each connection "connection/k" (rms of the result of f_cross /
    rms of the stream it is added to).
    """
    weight = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
    metrics = {
        "loss": sums["loss"] / weight,
        "accuracy": sums["correct"] / weight,
        "exact": sums["exact"] / jnp.maximum(sums["sequences"], 1.0),
        "sequences": sums["sequences"],
        "tokens": sums["weight"],
    }
    for k, (result, stream) in enumerate(sums.get("connections", ())):
        metrics[f"connection/{k}"] = jnp.sqrt(result / jnp.maximum(stream, 1e-30))
    return metrics


def as_numbers(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    """The metrics of `means` to report: without "exact" if no sequence has a prompt."""
    numbers = {key: float(value) for key, value in metrics.items()}
    if not numbers.pop("sequences"):
        del numbers["exact"]
    return numbers


def _sequences(segments_BT, prompt_BT, counted_BT, right_BT) -> tuple[jax.Array, jax.Array]:
    """How many segments with a prompt have only correct counted tokens, and how many have any."""
    length = segments_BT.shape[1]

    # Row by row: a scatter over all rows would gather the whole batch on every device.
    @jax.vmap
    def in_segments(segments_T, of_T):
        return jnp.zeros(length + 1, jnp.int32).at[segments_T].add(of_T.astype(jnp.int32))

    asked_BS, counted_BS = (in_segments(segments_BT, of) > 0 for of in (prompt_BT, counted_BT))
    asked_BS &= counted_BS
    wrong_BS = in_segments(segments_BT, counted_BT & ~right_BT)
    exact = jnp.sum(asked_BS & (wrong_BS == 0)).astype(jnp.float32)
    return exact, jnp.sum(asked_BS).astype(jnp.float32)
