"""The latent form of f_cross' cache: exact wherever it is kept, and kept where it is smaller."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from random_models import assert_close, gemma, llama, palm, random_composed

from calm_jax import sharding, units
from calm_jax.decoding import Generator, Sampling
from calm_jax.decoding.memory import bytes_per_row, check_fits, token_bytes
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, DecoderConfig, Inputs, cross_attention
from calm_jax.models.cache import Slots
from calm_jax.models.cross_attention import expands
from calm_jax.models.cross_cache import CrossBytes
from calm_jax.models.parameters import Structure, module_tree
from calm_jax.presets import PRESETS
from calm_jax.training.flops import matmul_flops

ROOT = pathlib.Path(__file__).parents[2]
EVERY = CompositionConfig(every=1)
PAIR = (palm(num_layers=2), (llama(num_layers=2),))
# Each option of a composition in the forms that are exact; every augment of these keeps latents.
LATENT = {
    "a loop": (llama(num_layers=3), (palm(num_layers=3, embed_dim=12),), EVERY),
    "one by one": (*PAIR, CompositionConfig(every=1, scan=False)),
    "the paper's": (*PAIR, CompositionConfig.paper(every=1)),
    "biases and a gate": (*PAIR, CompositionConfig(every=1, bias=True, gate=True)),
    "biases, unnormed": (*PAIR, CompositionConfig.paper(every=1, bias=True)),
    "no output": (*PAIR, CompositionConfig(every=1, output_projection=False, bias=True)),
    "other heads": (*PAIR, CompositionConfig(every=1, num_heads=3, head_dim=6)),
    "a shared tap": (*PAIR, CompositionConfig(((1, 0), (0, 1), (1, 1)))),
    "only the prompt": (*PAIR, CompositionConfig(every=1, encoder_only=True)),
    "several augments": (
        gemma(num_layers=2, window=3),
        (palm(num_layers=2), llama(num_layers=2)),
        (CompositionConfig(every=1), CompositionConfig(((0, 1), (1, 0)), bias=True)),
    ),
}
ROTARY = {
    "rotary": (*PAIR, CompositionConfig(every=1, rotary=True, bias=True)),
    "one of two": (
        palm(num_layers=2),
        (palm(num_layers=2), llama(num_layers=2)),
        (CompositionConfig(every=1, rotary=True), EVERY),
    ),
}


def project_all(monkeypatch):
    """From now on new caches have the projected form."""
    monkeypatch.setattr(CrossBytes, "is_latent", property(lambda self: False))


def forms(cache):
    """For each augment, whether its cache is latent; no connection has both caches, or none."""
    latent = [x is not None for x in cache.latents]
    assert any(latent) or None not in sum(cache.bridge, ())
    return latent


@pytest.fixture
def ragged():
    """Two rows of ten tokens with padding at either end, and their prompts."""
    segments = np.array([[1] * 6 + [0] * 4, [0, 0] + [1] * 8], np.int32)
    return Inputs(
        np.random.default_rng(1).integers(24, size=segments.shape).astype(np.int32),
        segments_BT=segments,
        prompt_mask_BT=np.tile(np.arange(10) < 4, (2, 1)).astype(np.int32),
    )


# The projected form is that of training: of its options a few are read in pieces by default.
PROJECTED = ("biases and a gate", "only the prompt", "several augments")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(
            name,
            form,
            marks=pytest.mark.slow
            if name in ("a loop", "one by one") or (form == "projected" and name not in PROJECTED)
            else (),
        )
        for name in (*LATENT, *ROTARY)
        for form in ("latent", "projected")
    ],
)
def test_what_is_read_in_pieces_is_what_is_read_at_once(name, form, ragged, monkeypatch):
    """Long pieces make keys and values of the latents, short ones attend to them."""
    model, expanded = random_composed(*(LATENT | ROTARY)[name]), set()
    monkeypatch.setattr(
        cross_attention, "expands", lambda *sizes: expanded.add(expands(*sizes)) or expands(*sizes)
    )
    if form == "projected":
        project_all(monkeypatch)
    numbers = np.cumsum(ragged.segments_BT != 0, axis=1, dtype=np.int32) - 1
    with jax.disable_jit():
        expected, _ = model.residual(ragged.replace(positions_BT=numbers))
        assert not expanded
        cache, found = model.init_cache(2, 12), []
        for start, stop in ((0, 7), (7, 8), (8, 10)):
            piece = jax.tree.map(lambda x, a=start, b=stop: x[:, a:b], ragged)
            x_BTD, cache = model.residual(piece, cache)
            found.append(x_BTD)
    real_BT = ragged.segments_BT != 0
    assert_close(jnp.concatenate(found, axis=1)[real_BT], expected[real_BT], 1e-5)
    rotary = [config.rotary for config in model.configs]
    assert forms(cache) == [form == "latent" and not each for each in rotary]
    assert expanded == ({True, False} if any(forms(cache)) else set())


@pytest.mark.parametrize(
    "name",
    [
        "a shared tap",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("a loop", "several augments", "one of two", "only the prompt")
        ),
    ],
)
def test_both_forms_give_the_same_answers(name, monkeypatch):
    """More prompts than rows, read in chunks, some with a shared beginning."""
    model, random = random_composed(*(LATENT | ROTARY)[name]), np.random.default_rng(0)
    prompts = [random.integers(1, 24, size).tolist() for size in (1, 34, 18, 33)]
    prompts += [[*prompts[1][:20], 5, 6]]
    found = []
    for form in ("latent", "projected"):
        if form == "projected":
            project_all(monkeypatch)
        generator = Generator(model, max_length=64, slots=2, prefill_chunk=32)
        found.append(generator.generate(prompts, Sampling(max_new_tokens=6, logprobs=0)))
    for (latent,), (projected,) in zip(*found, strict=True):
        assert latent.tokens == projected.tokens
        np.testing.assert_allclose(
            *([x.logprob for x in answer.logprobs] for answer in (latent, projected)), atol=2e-5
        )


@pytest.mark.slow
def test_int8_latents_differ_by_rounding_alone(monkeypatch):
    """Both forms move scores a little; neither by nothing, and not by the same."""
    model, random = random_composed(*LATENT["a loop"]), np.random.default_rng(0)
    prompts = [random.integers(1, 24, 30).tolist() for _ in range(4)]

    def scores(dtype):
        generator = Generator(model, max_length=64, slots=2, cache_dtype=dtype)
        found = generator.score([p[:10] for p in prompts], [p[10:] for p in prompts])
        return np.array([one.tokens_logprobs for one in found])

    exact, latent = scores(None), scores("int8")
    project_all(monkeypatch)
    projected = scores("int8")
    for rounded in (latent, projected):
        assert 0 < np.abs(rounded - exact).max() < 0.1
    assert np.any(latent != projected)


def test_large_features_of_a_tap_spoil_their_own_group_alone():
    model = random_composed(
        palm(), (palm(embed_dim=256),), CompositionConfig(((2, 2),), num_heads=1, head_dim=256)
    )
    (latents,) = model.init_cache(2, 4, "int8").latents
    x_PTKE = np.random.default_rng(0).normal(size=(2, 3, 1, 256)).astype(np.float32)
    x_PTKE[..., 5] = 1000
    slots, slots_PT = Slots.empty(2, 4), jnp.array([[0, 1, 2], [0, 4, 4]])
    found = latents.write(0, slots, slots_PT, x_PTKE).read(0, slots, jnp.float32)[:, :, 0]
    error = np.abs(found[0, :3] - x_PTKE[0, :, 0]).reshape(3, 2, 128)
    largest = np.abs(x_PTKE[0]).reshape(3, 2, 128).max(-1)
    assert np.all(error.max(-1) <= 1.001 * largest / 127 / 2)
    assert np.all(error.max(-1) > 0)
    assert not np.any(found[0, 3]) and not np.any(found[1, 1:])  # slots 4 are no slots


@pytest.mark.parametrize(
    ("mesh", "head_dim", "dtype", "latent"),
    [
        ({"data": 8}, 8, None, True),
        ({"data": 2, "tensor": 4}, 8, None, True),
        ({"data": 2, "tensor": 4}, 8, "int8", True),
        # 4 heads of 2 for keys and as many for values are 16 numbers, as a tap is.
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2, None, False),
        # And their 4 scales, on each of 2 devices, are more than its one.
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2, "int8", True),
    ],
    ids=str,
)
def test_bytes_on_a_mesh_are_those_of_the_arrays(mesh, head_dim, dtype, latent):
    """The anchor's 2 key heads stay whole on 4 devices; the form that is smaller is kept."""
    model = tiny_models.composed(CompositionConfig(every=2, num_heads=4, head_dim=head_dim))
    structure, mesh = Structure(model), sharding.make_mesh(mesh)
    spread = structure.merge(jax.device_put(module_tree(model), structure.shardings(mesh)))
    cache = spread.init_cache(8, 24, dtype)
    assert forms(cache) == [latent]
    arrays = [x for x in jax.tree.leaves(cache) if x.ndim > 2]
    rows = arrays[0].sharding.shard_shape(arrays[0].shape)[1]
    assert rows == 8 // (8 // mesh.shape["tensor"])
    held = sum(x.addressable_shards[0].data.nbytes for x in arrays)
    assert held == rows * bytes_per_row(spread, 24, dtype)


def test_caches_that_do_not_fit_devices_that_share_key_heads(monkeypatch):
    """Rows are split by `data` alone, or not at all; key heads that do not divide are whole."""
    model = tiny_models.composed(CompositionConfig(every=2, num_heads=4))
    structure = Structure(model)
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    spread = structure.merge(jax.device_put(module_tree(model), structure.shardings(mesh)))
    row = bytes_per_row(spread, 32)
    monkeypatch.setattr("calm_jax.decoding.memory.RESERVED", 0)
    monkeypatch.setattr("calm_jax.decoding.memory.free_bytes", lambda array: 3 * row)
    check_fits(spread, 6, 32, None)
    check_fits(spread, 3, 32, None)
    with pytest.raises(CalmError, match=r"of 8 rows of 32 tokens take .*; 6 rows would fit"):
        check_fits(spread, 8, 32, None)
    with pytest.raises(CalmError, match=r"of 5 rows .*; 6 rows would fit"):
        check_fits(spread, 5, 32, None)


@pytest.mark.parametrize(
    ("name", "width", "layers", "key_features"),
    [("gemma2_9b", 3584, 42, 8 * 256), ("gemma2_27b", 4608, 46, 16 * 128)],
)
def test_bytes_of_published_pairs(name, width, layers, key_features):
    """Six of the small model's 26 layers are tapped, the last is the 24th; 2 bytes a number."""
    anchor, augment = (DecoderConfig.from_dict(PRESETS[each]) for each in (name, "gemma2_2b"))
    token = token_bytes(anchor, [augment], [CompositionConfig(every=4)])
    assert token.anchor == layers * 2 * key_features * 2
    assert token.augments == (24 * 2 * 4 * 256 * 2,)
    assert token.cross == (CrossBytes(projected=6 * 2 * width * 2, latent=6 * 2304 * 2),)
    assert token.total == token.anchor + token.augments[0] + 6 * 2304 * 2
    (cross,) = token.cross
    numbers = (token.anchor, *token.augments, cross.latent, cross.projected, token.total)
    told = " | ".join(map(units.size, numbers))
    assert f"| {told} |" in (ROOT / "docs/decoding.md").read_text()


@pytest.mark.parametrize("T", [1, 3, 4, 5, 6, 8, 32])
@pytest.mark.parametrize("S", [8, 64])
def test_the_form_with_fewer_flops_is_computed(T, S, monkeypatch):
    model = random_composed(*LATENT["one by one"])  # heads of 4 features, an augment of 16

    def flops(choice):
        monkeypatch.setattr(cross_attention, "expands", lambda *sizes: choice)
        (module,) = model.bridge.rounds[0]
        inputs = Inputs(jnp.zeros((1, S), jnp.int32)).filled()
        queries = inputs.replace(segments_BT=jnp.ones((1, T), jnp.int32))
        queries = queries.replace(tokens_BT=None, positions_BT=None).filled()
        forward = cross_attention.BridgePass(
            model.configs[0], model.config, model.execution, queries, inputs
        )
        absorbed = module.absorbed()
        return matmul_flops(
            lambda h_BTD, latent_BSE: absorbed.attend_to_latents(h_BTD, latent_BSE, forward),
            jnp.zeros((1, T, 16)),
            jnp.zeros((1, S, 16)),
        )

    counted = {choice: flops(choice) for choice in (True, False)}
    assert expands(T, S, 16, 4) == (counted[True] < counted[False])
