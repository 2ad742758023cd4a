"""Caches: what is read in pieces is what is read at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from random_models import assert_close, gemma, llama, palm, random_composed, random_decoder

from calm_jax import sharding
from calm_jax.models import ComposedDecoder, CompositionConfig, Inputs
from calm_jax.models.calling import call, make_on_mesh_of
from calm_jax.models.parameters import Structure, module_tree

DECODERS = {
    "palm": palm(num_layers=2),
    "xpos, l2 norms": palm(num_layers=2, qk_norm="l2", xpos_scale_base=8.0),
    "llama, window": llama(num_layers=4, window=3, window_pattern=(True, False)),
    "gemma 2": gemma(window=3, window_pattern=(True, False), attention_logit_cap=5.0),
    "gemma 3": gemma(num_layers=2, window=2, local_rope_base=100.0, qk_norm="rms", post_norms=True),
    "gpt-j": palm(
        num_layers=2, rope="interleaved", rope_dim=4, norm="layer", norm_bias=True, mlp_bias=True
    ),
    "no rotary": llama(num_layers=2, rope=None, attention_bias=True),
}
COMPOSED = {
    "regular": (llama(num_layers=5), (palm(num_layers=4),), CompositionConfig(every=2)),
    "irregular, rotary": (
        palm(num_layers=2),
        (llama(num_layers=2, window=2),),
        CompositionConfig(((0, 1), (1, 0), (1, 1)), rotary=True, bias=True),
    ),
    "several augments": (
        gemma(num_layers=2, window=3),
        (palm(num_layers=2), llama(num_layers=2)),
        (CompositionConfig(every=1), CompositionConfig(every=2, rotary=True)),
    ),
    "only the prompt": (
        palm(num_layers=2),
        (palm(num_layers=2),),
        CompositionConfig(every=1, encoder_only=True, rotary=True),
    ),
}
ROWS = {
    "one segment": [[1] * 9] * 2,
    "padding at either end": [[1] * 5 + [0] * 4, [0, 0] + [1] * 6 + [0]],
    "packed": [[1] * 4 + [2] * 5, [3] * 2 + [1] * 6 + [0]],
}


def inputs_of(rows):
    """Tokens, segments and prompt of two rows; positions count the tokens of a segment."""
    segments = np.array(ROWS[rows], np.int32)
    positions = np.array(
        [[np.sum(row[:t] == row[t]) for t in range(len(row))] for row in segments], np.int32
    )
    return Inputs(
        np.random.default_rng(1).integers(24, size=segments.shape).astype(np.int32),
        segments_BT=None if rows == "one segment" else segments,
        positions_BT=positions if rows == "packed" else None,
        prompt_mask_BT=(positions < 3).astype(np.int32),
    )


def piece(inputs, start, stop):
    return jax.tree.map(lambda x: x[:, start:stop], inputs)


def in_pieces(model, inputs, cuts, slots):
    """The residual stream, read piece by piece."""
    cache, found = model.init_cache(len(inputs.tokens_BT), slots), []
    for start, stop in zip([0, *cuts], [*cuts, 9], strict=True):
        x_BTD, cache = model.residual(piece(inputs, start, stop), cache)
        found.append(x_BTD)
    return jnp.concatenate(found, axis=1), cache


def compare(model, rows, cuts):
    inputs = inputs_of(rows)
    # A cached token's position is its number in the row, where none is given.
    if inputs.positions_BT is None and inputs.segments_BT is not None:
        numbers = np.cumsum(inputs.segments_BT != 0, axis=1, dtype=np.int32) - 1
        whole = inputs.replace(positions_BT=numbers)
    else:
        whole = inputs
    with jax.disable_jit():  # operation by operation: no two cases compile alike
        expected, none = model.residual(whole)
        found, cache = in_pieces(model, inputs, cuts, slots=11)
    assert none is None
    real_BT = np.array(ROWS[rows]) != 0
    assert_close(np.asarray(found)[real_BT], np.asarray(expected)[real_BT], 1e-5)
    slots = cache.anchor.slots if isinstance(model, ComposedDecoder) else cache.slots
    np.testing.assert_array_equal(slots.length_B, real_BT.sum(1))
    for row, length in zip(ROWS[rows], real_BT.sum(1), strict=True):
        kept = [segment for segment in row if segment]
        assert np.asarray(slots.segments_BS)[ROWS[rows].index(row)].tolist() == kept + [0] * (
            11 - length
        )


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder(name):
    for rows in ROWS:
        compare(random_decoder(DECODERS[name]), rows, [4])


@pytest.mark.parametrize("name", COMPOSED)
def test_a_composed_model(name):
    for rows in ROWS:
        compare(random_composed(*COMPOSED[name]), rows, [4])


@pytest.mark.parametrize("cuts", [[2, 7], pytest.param([*range(1, 9)], marks=pytest.mark.slow)])
def test_any_pieces(cuts):
    compare(random_composed(*COMPOSED["only the prompt"]), "packed", cuts)


def test_tokens_beyond_the_last_slot_are_dropped():
    """They are read, but kept by nobody; those that are there stay as they were."""
    model, inputs = random_decoder(llama()), inputs_of("one segment")
    cache = model.init_cache(2, 6)
    _, cache = model.residual(piece(inputs, 0, 5), cache)
    _, after = model.residual(piece(inputs, 5, 9), cache)
    np.testing.assert_array_equal(
        after.layers.keys.values_LBKSH[:, :, :, :5], cache.layers.keys.values_LBKSH[:, :, :, :5]
    )
    assert np.any(np.asarray(after.layers.keys.values_LBKSH[:, :, :, 5]))
    np.testing.assert_array_equal(after.slots.segments_BS, np.ones((2, 6)))


def test_a_cache_on_a_mesh_is_laid_out_by_the_rules():
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    model = tiny_models.randomised(tiny_models.composed(CompositionConfig(every=2, num_heads=4)))
    structure = Structure(model)
    tokens = np.random.default_rng(0).integers(1, tiny_models.VOCAB, (4, 6)).astype(np.int32)
    expected = model(tokens)
    spread = structure.merge(jax.device_put(module_tree(model), structure.shardings(mesh)))
    cache = spread.init_cache(4, 8)
    found = []
    for start, stop in ((0, 5), (5, 6)):
        x_BTD, cache = call(spread, "residual", Inputs(tokens[:, start:stop]), cache)
        found.append(call(spread, "logits", x_BTD))
    assert_close(np.concatenate(found, axis=1), expected, 1e-5)
    # 4 rows over 2 devices; the anchor's 2 key heads stay whole, the 2 taps' features are split.
    held = {
        "anchor": (cache.anchor.layers.keys.values_LBKSH, (4, 2, 2, 8, 4)),
        "latents": (cache.latents[0].values_LBKSH, (2, 2, 1, 8, 4)),
        "slots": (cache.anchor.slots.segments_BS, (2, 8)),
    }
    for name, (array, shape) in held.items():
        assert array.sharding.shard_shape(array.shape) == shape, name


def test_without_a_cache_nothing_of_it_is_compiled():
    """The program is that of a plain loop over layers that know no cache."""
    model = random_decoder(llama())
    tokens = jnp.ones((1, 5), jnp.int32)
    text = jax.jit(lambda: model.residual(Inputs(tokens))[0]).lower().as_text()
    assert "scatter" not in text
    cached = jax.jit(lambda: model.residual(Inputs(tokens), model.init_cache(1, 8))[0])
    assert "scatter" in cached.lower().as_text()


def test_an_empty_cache_is_compiled_once_for_each_size():
    model = random_composed(*COMPOSED["several augments"])
    model.init_cache(2, 6)
    programs = make_on_mesh_of._cache_size()
    model.init_cache(2, 6)
    assert make_on_mesh_of._cache_size() == programs
    model.init_cache(2, 7)
    assert make_on_mesh_of._cache_size() == programs + 4  # the anchor, two augments, the bridge
