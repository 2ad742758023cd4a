import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx

from calm_jax.data.dataset import Dataset, TaskRows
from calm_jax.data.rows import Sequences
from calm_jax.models import Inputs
from calm_jax.training import loss as loss_module
from calm_jax.training.loss import as_numbers, means, noisy


def loss_sums(model, *inputs):
    return compiled_sums(*nnx.split(model), *inputs)


@functools.partial(jax.jit, static_argnums=(0, 4))
def compiled_sums(graphdef, state, batch, key=None, noise=0.0):
    return loss_module.loss_sums(nnx.merge(graphdef, state), batch, key, noise)


def independent_sums(logits_BTV, batch):
    """Sums by loops over tokens, in float64."""
    sums = dict.fromkeys(("loss", "weight", "correct", "exact", "sequences"), 0.0)
    for row in range(len(logits_BTV)):
        right_of, asked = {}, set()
        for t in range(logits_BTV.shape[1]):
            segment = batch["decoder_segment_ids"][row, t]
            weight = batch["decoder_loss_weights"][row, t]
            if batch["decoder_causal_attention"][row, t] and batch["decoder_positions"][row, t]:
                asked.add(segment)
            if segment == 0 or weight == 0:
                continue
            logits, target = logits_BTV[row, t], batch["decoder_target_tokens"][row, t]
            log_total = np.log(np.sum(np.exp(logits - logits.max()))) + logits.max()
            right = max(range(len(logits)), key=lambda v: logits[v]) == target
            sums["loss"] += weight * (log_total - logits[target])
            sums["weight"] += weight
            sums["correct"] += weight * right
            right_of.setdefault(segment, []).append(right)
        sums["sequences"] += len(asked & right_of.keys())
        sums["exact"] += sum(all(right_of[segment]) for segment in asked & right_of.keys())
    return sums


def logits_of(model, batch):
    return np.asarray(model(Inputs.of_batch(batch)), np.float64)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("make", [tiny_models.decoder, tiny_models.composed])
def test_sums_are_those_of_a_loop_over_tokens(make, packed):
    model, batch = make(), tiny_models.batch(packed=packed, rows=6)
    logits_BTV = logits_of(model, batch)
    # A third of the rows is answered rightly, another third but for its first weighted token.
    batch["decoder_target_tokens"][:4] = logits_BTV.argmax(-1)[:4]
    for row in (2, 3):
        first = np.flatnonzero(batch["decoder_loss_weights"][row])[0]
        batch["decoder_target_tokens"][row, first] += 1
        batch["decoder_target_tokens"][row, first] %= tiny_models.VOCAB
    batch["decoder_loss_weights"] *= np.linspace(0.5, 2.0, 12, dtype=np.float32)  # not only 0 and 1

    loss, sums = loss_sums(model, batch)

    expected = independent_sums(logits_BTV, batch)
    assert 0 < expected["exact"] < expected["sequences"]
    assert expected["correct"] < expected["weight"]
    for key, value in expected.items():
        np.testing.assert_allclose(sums[key], value, rtol=2e-5, err_msg=key)
    np.testing.assert_allclose(loss, expected["loss"], rtol=2e-5)


def test_weights_on_padding_count_for_nothing():
    model, batch = tiny_models.decoder(), tiny_models.batch()
    expected = loss_sums(model, batch)[1]
    poisoned = dict(batch)
    padding = batch["decoder_segment_ids"] == 0
    assert padding.any()
    poisoned["decoder_loss_weights"] = np.where(padding, 9.0, batch["decoder_loss_weights"])
    jax.tree.map(np.testing.assert_array_equal, loss_sums(model, poisoned)[1], expected)


def test_target_zero_is_a_token_like_any_other():
    model, batch = tiny_models.decoder(), tiny_models.batch()
    batch["decoder_target_tokens"][:] = 0
    expected = independent_sums(logits_of(model, batch), batch)
    loss, sums = loss_sums(model, batch)
    np.testing.assert_allclose(loss, expected["loss"], rtol=2e-5)
    assert sums["weight"] == expected["weight"] > 0


def test_means_divide_what_batches_add_up_to():
    first = {"loss": 6.0, "weight": 3.0, "correct": 2.0, "exact": 1.0, "sequences": 2.0}
    second = {"loss": 1.0, "weight": 1.0, "correct": 1.0, "exact": 0.0, "sequences": 3.0}
    connections = np.array([[4.0, 16.0], [9.0, 1.0]])
    sums = {key: np.float32(first[key] + second[key]) for key in first}
    result = means(sums | {"connections": connections})
    assert {key: float(value) for key, value in result.items()} == pytest.approx(
        {
            "loss": 7 / 4,
            "accuracy": 3 / 4,
            "exact": 1 / 5,
            "sequences": 5,
            "tokens": 4,
            "connection/0": 0.5,
            "connection/1": 3.0,
        }
    )


@pytest.mark.parametrize("pack", [False, True])
def test_only_what_has_a_prompt_can_be_exact(pack):
    """Of four rightly predicted sequences two are plain text, in rows as they are cached."""
    model = tiny_models.decoder()
    sequences = Sequences.of([[3, 4], [], [5], []], [[6], [7, 8, 9], [10, 11], [12]], [1])
    rows = sequences.rows(12, pack)
    part = TaskRows("mixed", 1.0, False, rows)
    batch = Dataset((part,), 12).batch(np.arange(len(part)))
    batch["decoder_target_tokens"] = logits_of(model, batch).argmax(-1).astype(np.int32)
    sums = loss_sums(model, batch)[1]
    assert (sums["exact"], sums["sequences"], sums["weight"]) == (2, 2, 7)
    assert as_numbers(means(sums)) == {"loss": sums["loss"] / 7} | {
        "accuracy": 1, "exact": 1, "tokens": 7}  # fmt: skip
    batch["decoder_causal_attention"] = (batch["decoder_positions"] == 0).astype(np.int32)
    text = as_numbers(means(loss_sums(model, batch)[1]))
    assert text.keys() == {"loss", "accuracy", "tokens"}


def test_means_of_nothing_are_zero():
    model, batch = tiny_models.composed(), tiny_models.batch()
    batch["decoder_segment_ids"][:] = 0
    result = means(loss_sums(model, batch)[1])
    assert all(float(value) == 0 for value in result.values()), result


def test_connection_metric_is_the_size_of_what_is_added():
    """The bridge's W_O twice as large: its result, and so the first connection's ratio, doubles."""
    model = tiny_models.randomised(tiny_models.composed())
    batch = tiny_models.batch(packed=True)
    before = means(loss_sums(model, batch)[1])
    first = model.bridge.rounds[0][0]
    first.output.set_value(2 * first.output.get_value())
    after = means(loss_sums(model, batch)[1])
    assert before["connection/0"] > 0.01
    np.testing.assert_allclose(after["connection/0"], 2 * before["connection/0"], rtol=1e-5)


def test_noise_has_the_strength_it_is_asked_for():
    """Sequences draw strengths evenly from 0 to noise, so their mean is half of that."""
    x_BTD = jax.random.normal(jax.random.key(1), (200, 16, 32))
    x_BTD *= jnp.exp(jax.random.normal(jax.random.key(4), (200, 16, 1)))  # long and short vectors
    rms_BT1 = np.sqrt(np.mean(np.square(x_BTD), axis=-1, keepdims=True))
    segments_BT = jnp.repeat(jnp.array([[1, 2]]), 8, axis=1).repeat(200, axis=0)  # two a row
    added = np.asarray(noisy(x_BTD, segments_BT, jax.random.key(2), 0.5) - x_BTD) / rms_BT1
    strength = added.reshape(200, 2, 8, 32).std(axis=(2, 3))
    assert abs(added.mean()) < 0.01
    assert 0 < strength.min() < 0.02
    assert 0.45 < strength.max() < 0.58
    np.testing.assert_allclose(strength.mean(), 0.5 / 2, rtol=0.1)
    # The sequences of one row draw on their own; within one the strength is one.
    assert abs(np.corrcoef(strength.T)[0, 1]) < 0.2
    halves = added.reshape(200, 2, 2, 4, 32).std(axis=(3, 4))
    assert np.corrcoef(halves[..., 0].ravel(), halves[..., 1].ravel())[0, 1] > 0.9
    other = noisy(x_BTD, segments_BT, jax.random.key(3), 0.5) - x_BTD
    assert not np.allclose(added * rms_BT1, other)


@pytest.mark.parametrize("make", [tiny_models.decoder, tiny_models.composed])
def test_noise_0_changes_nothing_and_more_does(make):
    model, batch = make(), tiny_models.batch()
    if make is tiny_models.composed:
        tiny_models.randomised(model)
    without = loss_sums(model, batch)[0]
    assert loss_sums(model, batch, jax.random.key(0), 0.0)[0] == without
    assert loss_sums(model, batch, jax.random.key(0), 0.5)[0] != without


def test_noise_is_on_what_the_bridge_reads_and_nothing_else():
    """A new bridge adds nothing, whatever it reads: the anchor itself is not disturbed."""
    model, batch = tiny_models.composed(), tiny_models.batch()
    without = loss_sums(model, batch)[0]
    assert loss_sums(model, batch, jax.random.key(0), 0.5)[0] == without


def test_noise_keeps_the_dtype():
    x_BTD, segments_BT = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((2, 3), jnp.int32)
    assert noisy(x_BTD, segments_BT, jax.random.key(0), 0.1).dtype == jnp.bfloat16
