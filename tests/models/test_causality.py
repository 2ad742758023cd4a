"""No future token, no other segment and no padding changes a logit, least of all by the bridge."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import as_inputs, llama, packed_batch, palm, random_composed, random_tree

from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig
from calm_jax.models.cross_attention import BridgePass, CrossAttention
from calm_jax.models.execution import Execution
from calm_jax.models.parameters import Structure

BRIDGES = {
    "paper": CompositionConfig.paper(every=1),
    "rotary, bias, gate, norms": CompositionConfig(
        every=1, init="paper", rotary=True, bias=True, gate=True
    ),
    "only the prompt": CompositionConfig(every=1, init="paper", encoder_only=True),
    "no output projection": CompositionConfig.paper(every=1, output_projection=False, bias=True),
}


def visible(segments_BT, prompt_BT=None):
    """Bool [B, T, S] by the rule, one pair at a time."""
    B, T = segments_BT.shape
    allowed = np.zeros((B, T, T), bool)
    for b, t, s in np.ndindex(B, T, T):
        same = segments_BT[b, t] == segments_BT[b, s] != 0
        allowed[b, t, s] = s <= t and same and (prompt_BT is None or prompt_BT[b, s] == 1)
    return allowed


def across_rows(allowed_BTS):
    """Bool [B, T, C, S]: row b sees taps of no other row c."""
    B = len(allowed_BTS)
    return allowed_BTS[:, :, None] & np.eye(B, dtype=bool)[:, None, :, None]


@pytest.mark.parametrize("name", BRIDGES)
def test_gradient_of_the_bridge_by_its_tap(name):
    config = BRIDGES[name]
    structure = Structure(nnx.eval_shape(lambda: CrossAttention(config, palm(), 6, nnx.Rngs(0))))
    crossing = structure.merge(random_tree(structure, 0))
    _, positions, segments, prompt = packed_batch()
    inputs = as_inputs(segments, positions, segments, prompt)
    bridge_pass = BridgePass(config, palm(), Execution(), inputs)

    def result(tap_BSE):
        keys_and_values = crossing.keys_and_values(tap_BSE, jnp.float32, bridge_pass)
        return crossing.attend(h_BTD, *keys_and_values, bridge_pass)[0]

    random = np.random.default_rng(0)
    h_BTD = random.normal(size=(3, 11, 16)).astype(np.float32)
    tap_BSE = random.normal(size=(3, 11, 6)).astype(np.float32)

    jacobian = jax.jit(jax.jacrev(lambda tap: result(tap).sum(-1)))(tap_BSE)
    moved = np.any(np.asarray(jacobian) != 0, axis=-1)
    expected = across_rows(visible(segments, prompt if config.encoder_only else None))
    np.testing.assert_array_equal(moved, expected)

    y_BTD = result(jnp.asarray(tap_BSE))
    blind_BT = ~visible(segments, prompt if config.encoder_only else None).any(-1)
    assert blind_BT.any()
    assert np.all(np.asarray(y_BTD)[blind_BT] == 0)
    assert np.all(np.asarray(y_BTD)[~blind_BT] != 0)


def test_gradient_of_logits_by_the_taps():
    composed = random_composed(palm(), (llama(embed_dim=8),), CompositionConfig.paper(every=1))
    tokens, positions, segments, prompt = packed_batch()

    def logits_of(delta_BSE):
        inputs = as_inputs(tokens, positions, segments, prompt)
        x_BTD, _ = composed.perturbed(inputs, lambda tap_BSE, *_: tap_BSE + delta_BSE)
        return composed.logits(x_BTD)[..., 0]

    jacobian = jax.jit(jax.jacrev(logits_of))(jnp.zeros((3, 11, 8)))
    moved = np.any(np.asarray(jacobian) != 0, axis=-1)
    np.testing.assert_array_equal(moved, across_rows(visible(segments)))


@st.composite
def packed_rows(draw, length):
    """Segment ids of one row: runs of any segments, padding anywhere, a segment may come again."""
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=4)))
    lengths = np.diff([0, *cuts, length])
    return [s for n in lengths for s in [draw(st.integers(0, 3))] * n]


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(data=st.data())
def test_what_a_token_may_not_see_changes_nothing(data):
    anchor_layers, augment_layers, T = 3, 2, 7
    pair = st.tuples(st.integers(0, augment_layers - 1), st.integers(0, anchor_layers - 1))
    connections = data.draw(st.lists(pair, min_size=1, max_size=5, unique=True))
    options = data.draw(st.sampled_from([{}, {"bias": True, "rotary": True, "gate": True}]))
    encoder_only = data.draw(st.booleans())
    augment = data.draw(st.sampled_from([palm(num_layers=2), llama(num_layers=2, window=3)]))
    config = CompositionConfig(connections=connections, encoder_only=encoder_only, **options)
    bits = st.lists(st.integers(0, 1), min_size=T, max_size=T)
    segments = np.array([data.draw(packed_rows(T)), data.draw(packed_rows(T))], np.int32)
    prompt = np.array([data.draw(bits), data.draw(bits)], np.int32)
    row, t = data.draw(st.integers(0, 1)), data.draw(st.integers(0, T - 1))
    hidden_S = ~visible(segments)[row, t]
    tokens = np.random.default_rng(data.draw(st.integers(0, 99))).integers(24, size=(2, T))
    changed = (tokens + 1 + np.arange(T)) % 24
    changed[row] = np.where(hidden_S, changed[row], tokens[row])
    # Padding reads nothing but itself: its own token is the only one that may count.
    changed[row, t] = tokens[row, t]

    composed = random_composed(llama(num_layers=3), (augment,), config)
    with jax.disable_jit():  # operation by operation, so that no two examples compile anew
        before = composed(as_inputs(tokens, None, segments, prompt))
        after = composed(as_inputs(changed, None, segments, prompt))
    np.testing.assert_array_equal(before[row, t], after[row, t])


@pytest.fixture(scope="module")
def prompted():
    config = CompositionConfig(every=1, init="paper", bias=True, gate=True, encoder_only=True)
    return random_composed(llama(), (palm(),), config)


def test_a_query_with_nothing_to_see_adds_exactly_nothing(prompted):
    tokens, positions, segments, prompt = packed_batch()
    alone = np.asarray(prompted.anchor(as_inputs(tokens, positions, segments)))
    no_prompt = np.asarray(prompted(as_inputs(tokens, positions, segments, np.zeros_like(prompt))))
    np.testing.assert_array_equal(no_prompt, alone)
    logits = np.asarray(prompted(as_inputs(tokens, positions, segments, prompt)))
    sees_BT = visible(segments, prompt).any(-1)
    np.testing.assert_array_equal(np.any(logits != alone, axis=-1), sees_BT)


def test_only_prompt_tokens_reach_the_logits_through_the_bridge(prompted):
    graphdef, state = nnx.split(prompted)
    composed = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
    # The anchor reads every token as the same: what tells tokens apart comes through the bridge.
    row = composed.anchor.embedding[...][:1]
    composed.anchor.embedding.set_value(jnp.tile(row, (composed.config.vocab_size, 1)))
    tokens, positions, segments, prompt = packed_batch()
    before = np.asarray(composed(as_inputs(tokens, positions, segments, prompt)))
    for s in range(tokens.shape[1]):
        changed = tokens.copy()
        changed[:, s] = (changed[:, s] + 5) % composed.config.vocab_size
        after = np.asarray(composed(as_inputs(changed, positions, segments, prompt)))
        moved_BT = np.any(before != after, axis=-1)
        np.testing.assert_array_equal(moved_BT, visible(segments, prompt)[:, :, s])


def test_encoder_only_without_the_prompt_is_an_error():
    composed = random_composed(palm(), (palm(),), CompositionConfig(every=1, encoder_only=True))
    with pytest.raises(CalmError, match="'decoder_causal_attention'"):
        composed(packed_batch()[0])
