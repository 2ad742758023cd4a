"""Augments that read other tokens than the anchor, of the same text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx
from random_models import (
    as_inputs,
    assert_close,
    llama,
    packed_batch,
    palm,
    random_composed,
    random_decoder,
)

from calm_jax import sharding
from calm_jax.checkpoints.composed import export_bridge
from calm_jax.data import own_tokens
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Inputs, compose
from calm_jax.models.execution import Execution
from calm_jax.models.parts import Parts

S = 7
OPTIONS = {
    "paper": {},
    "rotary": {"rotary": True, "bias": True, "gate": True},
    "only the prompt": {"encoder_only": True},
}


def config(**options):
    return CompositionConfig(every=1, init="paper", **options)


def own_inputs(segments_BT, prompt_BT, seed=0, vocab_size=24):
    """Random tokens [B, S] in the anchor's segments, each read from a random token of these on."""
    random = np.random.default_rng(seed)
    B, T = segments_BT.shape
    segments, order, prompt = (np.zeros((B, S), np.int32) for _ in range(3))
    for row in range(B):
        places = np.sort(random.choice(np.flatnonzero(segments_BT[row]), S - 1))
        segments[row, : S - 1] = segments_BT[row, places]
        order[row, : S - 1] = places
        prompt[row, : S - 1] = prompt_BT[row, places]
    # The last token of the first row is read by none.
    segments[0, S - 1], order[0, S - 1] = segments[0, S - 2], T
    tokens = random.integers(vocab_size, size=(B, S))
    return Inputs(tokens, None, segments, order, None, prompt)


def visible(anchor_segments, own, prompt_alone):
    """Bool [B, T, S] by the rule, one pair at a time."""
    B, T = anchor_segments.shape
    allowed = np.zeros((B, T, S), bool)
    for b, t, s in np.ndindex(B, T, S):
        same = anchor_segments[b, t] == own.segments_BT[b, s] != 0
        asked = not prompt_alone or own.prompt_mask_BT[b, s] == 1
        allowed[b, t, s] = same and asked and own.order_BT[b, s] <= t
    return allowed


@pytest.mark.parametrize("backend", ["xla", "chunked"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_of_logits_by_the_taps(name, backend):
    """A tap moves the logits of exactly those tokens that may read it."""
    composed = random_composed(palm(), (llama(embed_dim=8),), config(**OPTIONS[name]))
    composed.execution = Execution(attention=backend)
    tokens, positions, segments, prompt = packed_batch()
    own = own_inputs(segments, prompt)
    inputs = as_inputs(tokens, positions, segments, prompt).replace(augments=(own,))

    def logits_of(delta_BSE):
        x_BTD, _ = composed.perturbed(inputs, lambda tap_BSE, *_: tap_BSE + delta_BSE)
        return composed.logits(x_BTD)[..., 0]

    jacobian = jax.jit(jax.jacrev(logits_of))(jnp.zeros((3, S, 8)))
    moved_BTCS = np.any(np.asarray(jacobian) != 0, axis=-1)
    allowed = visible(segments, own, OPTIONS[name].get("encoder_only", False))
    # What one token reads, later tokens of its segment read through the anchor.
    reached = np.zeros_like(allowed)
    for b, t, s in np.ndindex(*allowed.shape):
        reached[b, t, s] = np.any(allowed[b, : t + 1, s] & (segments[b, : t + 1] == segments[b, t]))
    rows = np.eye(3, dtype=bool)[:, None, :, None]
    np.testing.assert_array_equal(moved_BTCS, reached[:, :, None] & rows)
    assert reached.any() and not reached[0, :, S - 1].any()


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_tokens_through_both_paths(name):
    composed = random_composed(palm(), (llama(embed_dim=8),), config(**OPTIONS[name]))
    tokens, positions, segments, prompt = packed_batch()
    inputs = as_inputs(tokens, positions, segments, prompt)
    order = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    both = inputs.replace(augments=(inputs.replace(order_BT=order),))
    assert_close(composed(both), composed(inputs), 1e-5)


def test_several_augments_of_which_one_shares_the_tokens():
    """Each reads as it would alone, so the order of the augments does not matter."""
    configs = (config(rotary=True), config(), config(encoder_only=True))
    augments = (llama(embed_dim=8), palm(num_layers=2), llama(embed_dim=8, num_layers=2))
    tokens, positions, segments, prompt = packed_batch()
    first, third = own_inputs(segments, prompt), own_inputs(segments, prompt, 1)
    inputs = as_inputs(tokens, positions, segments, prompt)
    composed = random_composed(palm(), augments, configs)
    found = composed(inputs.replace(augments=(first, None, third)))
    assert not np.allclose(found, composed(inputs.replace(augments=(third, None, first))))
    order = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    shared = inputs.replace(order_BT=order)
    assert_close(composed(inputs.replace(augments=(first, shared, third))), found, 1e-5)


def test_on_a_mesh_of_eight():
    composed = tiny_models.randomised(tiny_models.composed(CompositionConfig(every=2, rotary=True)))
    batch = tiny_models.batch()
    segments, prompt = batch["decoder_segment_ids"], batch["decoder_causal_attention"]
    inputs = Inputs.of_batch(batch).replace(augments=(own_inputs(segments, prompt, vocab_size=64),))
    expected = composed(inputs)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    parts = Parts(composed)
    trainable, frozen = parts.of(composed)
    shardings, frozen_shardings = parts.shardings(mesh)
    spread = parts.merge(
        sharding.resharded(trainable, shardings), sharding.resharded(frozen, frozen_shardings)
    )
    found = spread(jax.device_put(inputs, sharding.batch_sharding(mesh)))
    real = segments != 0
    assert_close(np.asarray(found)[real], np.asarray(expected)[real], 1e-5)


def pair():
    anchor, augment = (random_decoder(palm(vocab_size=264), seed) for seed in (0, 1))
    anchor.vocabulary, augment.vocabulary = load_vocabulary("bytes"), load_vocabulary("key_value")
    return compose(anchor, augment, config(), rngs=nnx.Rngs(2))


def test_a_pair_of_two_vocabularies_reads_one_text():
    composed = pair()
    found = own_tokens.alignments(composed.vocabulary, [composed.augments[0].vocabulary])
    rows = [composed.vocabulary.encode(text) for text in ("<math>ab+c=", "<subs>a")]
    batch = own_tokens.batch(found, rows)
    assert batch["augment_0_input_tokens"].shape == (2, 7)  # with the start token
    np.testing.assert_array_equal(batch["augment_0_order"][0], [0, 6, 8, 8, 10, 10, 10])
    logits = composed(Inputs.of_batch(batch))
    alone = composed(Inputs.of_batch(own_tokens.batch(found, rows[1:])))
    assert_close(logits[1, : len(rows[1])], alone[0], 1e-5)


def test_what_needs_one_tokenizer_says_so(tmp_path):
    composed = pair()
    with pytest.raises(CalmError, match="augment 0 has another tokenizer than the anchor, so it"):
        composed(np.ones((1, 3), np.int32))
    with pytest.raises(CalmError, match="which the form of transformers does not support"):
        export_bridge(composed, tmp_path / "exported", to="huggingface", anchor="a", augments=["b"])
    assert not list(tmp_path.iterdir())


def test_inputs_that_do_not_fit_are_refused():
    composed = random_composed(palm(), (llama(embed_dim=8),), config())
    tokens, _, segments, prompt = packed_batch()
    own, inputs = own_inputs(segments, prompt), as_inputs(tokens)
    with pytest.raises(CalmError, match="the inputs are for 2 augments, the model has 1"):
        composed(inputs.replace(augments=(own, own)))
    with pytest.raises(CalmError, match="the inputs of augment 0 have no order_BT"):
        composed(inputs.replace(augments=(inputs,)))
    with pytest.raises(CalmError, match="need the order of the anchor's array and no cache"):
        composed.residual(inputs.replace(augments=(own,)), composed.init_cache(3, 16))
