"""Caches of models whose augments have inputs of their own, against passes without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from cases import some_slow
from feature_encoders import Encoder, random_items
from flax import nnx
from random_models import assert_close, llama, palm, random_composed, random_decoder

from calm_jax import sharding
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Inputs, compose
from calm_jax.models.calling import call
from calm_jax.models.parameters import Structure, module_tree

T, S = 9, 12
EVERY = CompositionConfig(every=1, init="paper")
OPTIONS = {
    "latent": (EVERY,),
    "projected": (CompositionConfig(every=1, init="paper", rotary=True, bias=True),),
    "one by one": (CompositionConfig(((0, 1), (1, 0), (1, 1)), rotary=True),),
    "only the prompt": (CompositionConfig(every=1, init="paper", encoder_only=True),),
    "several": (EVERY, EVERY, CompositionConfig(every=2, rotary=True)),
}


def model_of(name, shared=()):
    """A model whose augments, except those `shared`, have tokens of their own."""
    augments = (llama(num_layers=2, embed_dim=8), palm(num_layers=2), llama(num_layers=2))
    configs = OPTIONS[name]
    model = random_composed(palm(num_layers=2), augments[: len(configs)], configs)
    model.own_tokens = tuple(number not in shared for number in range(len(configs)))
    return model


def anchor_inputs():
    tokens = np.random.default_rng(1).integers(24, size=(2, T)).astype(np.int32)
    prompt = np.broadcast_to((np.arange(T) < 4).astype(np.int32), tokens.shape)
    return Inputs(tokens, segments_BT=np.ones((2, T), np.int32), prompt_mask_BT=prompt)


def own_inputs(seed):
    """Random tokens of two rows, the second one shorter; each is read from a random token on."""
    random = np.random.default_rng(seed)
    order = np.sort(random.integers(T, size=(2, S))).astype(np.int32)
    segments = (np.arange(S) < [[S], [S - 4]]).astype(np.int32)
    tokens = random.integers(24, size=(2, S)).astype(np.int32)
    return Inputs(tokens, None, segments, order, None, (order < 4).astype(np.int32))


def part_of(own, chosen_BS):
    """Those inputs of each row that are chosen, in front; padding follows."""
    size = max(1, int(chosen_BS.sum(1).max()))
    places = np.argsort(~chosen_BS, axis=1, kind="stable")[:, :size]
    taken = jax.tree.map(lambda x: np.take_along_axis(np.asarray(x), places, axis=1), own)
    real = np.take_along_axis(chosen_BS, places, axis=1).astype(np.int32)
    return taken.replace(segments_BT=real)


def in_pieces(model, inputs, own, cuts, ahead=0):
    """The anchor's stream, read piece by piece; own inputs that a piece may see come before it."""
    cache = model.init_cache(2, T + 2, own=dict.fromkeys(range(len(own)), S + 1))
    found, done = [], 0
    for start, stop in zip([0, *cuts], [*cuts, T], strict=True):
        for number, each in enumerate(own):
            if each is None:
                continue
            for low in range(done, stop + ahead):  # one order at a time
                chosen = (np.asarray(each.order_BT) == low) & (np.asarray(each.segments_BT) == 1)
                if chosen.any():
                    cache = model.read_own(number, part_of(each, chosen), cache)
        done = stop + ahead
        piece = jax.tree.map(lambda x, part=slice(start, stop): x[:, part], inputs)
        x_BTD, cache = model.residual(piece, cache)
        found.append(x_BTD)
    return jnp.concatenate(found, axis=1), cache


@pytest.mark.parametrize("cuts", [[3, 4], pytest.param([*range(1, T)], marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", some_slow(OPTIONS, ("latent", "several")))
def test_what_is_read_in_pieces_is_what_is_read_at_once(name, cuts):
    shared = (1,) if name == "several" else ()
    model, inputs = model_of(name, shared), anchor_inputs()
    own = [None if k in shared else own_inputs(k) for k in range(len(OPTIONS[name]))]
    with jax.disable_jit():  # operation by operation: no two cases compile alike
        expected, _ = model.residual(inputs.replace(augments=tuple(own)))
        for ahead in (0, T):
            found, cache = in_pieces(model, inputs, own, cuts, ahead)
            assert_close(found, expected, 1e-5)
    assert [slots is None for slots in cache.own] == [each is None for each in own]
    np.testing.assert_array_equal(cache.own[0].length_B, [S, S - 4])


def test_what_a_row_has_dropped_is_seen_by_nobody():
    """Whatever its order: a row that is used again reads as an empty one."""
    model, inputs, own = model_of("latent"), anchor_inputs(), own_inputs(0)
    with jax.disable_jit():
        expected, _ = in_pieces(model, inputs, [own], [])
        _, cache = in_pieces(model, inputs, [own_inputs(5)], [])
        cache = cache.with_length(jnp.zeros(2, jnp.int32))
        for row in range(2):
            cache = cache.own_kept(jnp.int32(row), (jnp.int32(0),))
        cache = model.read_own(0, own, cache)
        found, _ = model.residual(inputs, cache)
    assert_close(found, expected, 1e-5)


def test_slots_are_added_where_they_are_too_few():
    model, inputs, own = model_of("several"), anchor_inputs(), own_inputs(0)
    others = [own_inputs(1), own_inputs(2)]
    with jax.disable_jit():
        expected, _ = model.residual(inputs.replace(augments=(own, *others)))
        cache = model.init_cache(2, T, own={0: 5, 1: S, 2: 5})
        first, rest = (jax.tree.map(lambda x, k=k: x[:, k], own) for k in (slice(5), slice(5, S)))
        for number, each in ((0, first), (1, others[0])):
            cache = model.read_own(number, each, cache)
        cache = cache.own_grown(0, S).own_grown(2, S + 3)
        for number, each in ((0, rest), (2, others[1])):
            cache = model.read_own(number, each, cache)
        found, cache = model.residual(inputs, cache)
    assert_close(found, expected, 1e-5)
    assert cache.own[2].order_BS.shape == (2, S + 3)


def test_features_are_read_once():
    config = CompositionConfig(connections=((0, 0), (2, 1)), init="paper", rotary=True)
    model = compose(random_decoder(palm()), Encoder(nnx.Rngs(1)), config, rngs=nnx.Rngs(2))
    model, inputs = tiny_models.randomised(model), anchor_inputs()
    features = np.stack([np.concatenate(random_items(row, 2)) for row in range(2)])
    order = np.repeat([[1, 5], [0, 8]], 3, axis=1).astype(np.int32)
    segments = np.ones((2, 6), np.int32)
    own = Inputs(None, features, segments, order, None, (order < 4).astype(np.int32))
    expected = call(model, "residual", inputs.replace(augments=(own,)))[0]
    cache = model.init_cache(2, T + 1, own={0: 6})
    assert cache.augments == (None,)
    cache, found = model.read_own(0, own, cache), []
    for start, stop in ((0, 5), (5, 6), (6, T)):
        piece = jax.tree.map(lambda x, a=start, b=stop: x[:, a:b], inputs)
        x_BTD, cache = call(model, "residual", piece, cache)
        found.append(x_BTD)
    assert_close(jnp.concatenate(found, axis=1), expected, 1e-5)


def test_on_a_mesh_of_eight():
    """In a loop over layers and rounds; larger caches are laid out as the smaller ones."""
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    for rotary in (False, True):
        config = CompositionConfig(every=2, num_heads=4, rotary=rotary)
        model = tiny_models.randomised(tiny_models.composed(config))
        model.own_tokens = (True,)
        inputs, own = anchor_inputs(), own_inputs(0)
        expected = call(model, "residual", inputs.replace(augments=(own,)))[0]
        structure = Structure(model)
        spread = structure.merge(jax.device_put(module_tree(model), structure.shardings(mesh)))
        small, large = (spread.init_cache(2, T, own={0: size}) for size in (S, 2 * S))
        with sharding.mesh_of(spread.anchor.embedding.get_value()):
            grown = jax.jit(lambda cache: cache.own_grown(0, 2 * S))(small)
        for ours, theirs in zip(*map(jax.tree.leaves, (grown, large)), strict=True):
            assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
        cache = jax.jit(lambda cache, own, model=spread: model.read_own(0, own, cache))(grown, own)
        found, _ = call(spread, "residual", inputs, cache)
        assert_close(found, expected, 1e-5)


def test_own_inputs_beside_a_cache_are_refused():
    model, own = model_of("latent"), own_inputs(0)
    with pytest.raises(CalmError, match="no cache; read_own puts them into one"):
        model.residual(anchor_inputs().replace(augments=(own,)), model.init_cache(2, 16))
