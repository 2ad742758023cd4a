"""PaLM re-created in PyTorch: the original's logits, an independent forward pass, three layouts."""

import os
import pathlib

import numpy as np
import pytest
import torch_files
from converting import decoder_in_memory
from etils import epath
from flax import nnx
from random_models import assert_close
from safetensors.numpy import save_file

import calm_jax
from calm_jax.checkpoints.convert.palm_pytorch import PalmPytorch
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.checkpoints.sources.source import Source
from calm_jax.errors import CalmError
from calm_jax.models.parameters import count, module_tree

V, D, N, H, F, L, T = 40, 16, 4, 8, 32, 3, 40
GOLDEN = pathlib.Path(
    os.environ.get("CALM_TEST_DATA", "absent"), "golden", "palm_pytorch_v0_2_1.npz"
)


def in_memory(tensors, **options):
    source = Source(epath.Path("palm.pt"), "torch", tensors)
    assert PalmPytorch().recognises(source)
    return decoder_in_memory(PalmPytorch(), source, **options)


def rlhf(*, qk_norm=False, buffers=True, xpos=True, offset=0.0) -> dict[str, np.ndarray]:
    """Tensors in the names of PaLM-rlhf-pytorch, every parameter random."""
    random = np.random.default_rng(1)

    def draw(*shape, around=0.0, std=0.25):
        return (around + std * random.normal(size=shape)).astype(np.float32)

    pairs = np.arange(0, H, 2)
    found = {"token_emb.weight": draw(V, D, std=1.0)}
    for i in range(L):
        layer = f"layers.{i}.fn."
        found |= {
            layer + "norm.gamma": draw(D, around=1 - offset),
            layer + "norm.beta": np.zeros(D, np.float32),
            layer + "fused_attn_ff_proj.weight": draw(N * H + 2 * H + 2 * F, D),
            layer + "attn_out.weight": draw(D, N * H),
            layer + "ff_out.2.weight": draw(D, F),
        }
        if qk_norm:
            found |= {layer + "q_scale": draw(H, around=3), layer + "k_scale": draw(H, around=3)}
        if buffers:
            found[layer + "rotary_emb.inv_freq"] = (1e4 ** (-pairs / H)).astype(np.float32)
        if buffers and xpos:
            scale = (pairs + 0.4 * H) / (1.4 * H)
            found[layer + "rotary_emb.scale"] = scale.astype(np.float32)
    found |= {"norm.gamma": draw(D, around=1 - offset), "norm.beta": np.zeros(D, np.float32)}
    return found | {"to_logits.weight": found["token_emb.weight"]}


def in_sequence(tensors) -> dict[str, np.ndarray]:
    """The same in the names of PaLM-pytorch, which numbers its modules."""
    found = {}
    for name, array in tensors.items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            name = f"{int(layer) + 1}.{rest}".replace("ff_out.2", "ff_out.1")
        name = name.replace("token_emb", "0").replace("to_logits", str(L + 2))
        found[f"{L + 1}.{name.removeprefix('norm.')}" if name.startswith("norm.") else name] = array
    return found


def gate_first(tensors) -> dict[str, np.ndarray]:
    """The same with the two halves of every MLP exchanged, as other families order them."""
    found = dict(tensors)
    for name in tensors:
        if name.endswith("fused_attn_ff_proj.weight"):
            heads, up, gate = np.split(tensors[name], [-2 * F, -F])
            found[name] = np.concatenate([heads, gate, up])
    return found


def numpy_logits(tensors, tokens, *, xpos, offset=0.0, query_scale=H**-0.5) -> np.ndarray:
    """The forward pass of PaLM-rlhf-pytorch written out, float64."""
    t = {name: array.astype(np.float64) for name, array in tensors.items()}

    def norm(x, gamma):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (gamma + offset)

    positions, pairs = np.arange(len(tokens)), np.arange(0, H, 2)
    angles = np.tile(positions[:, None] * 1e4 ** (-pairs / H), 2)
    power = (positions - len(tokens) // 2)[:, None] / 512
    decay = np.tile(((pairs + 0.4 * H) / (1.4 * H)) ** power, 2) if xpos else 1.0

    def rotate(x, scale):
        first, second = np.split(x, 2, axis=-1)
        turned = np.concatenate([-second, first], axis=-1)
        return (x * np.cos(angles) + turned * np.sin(angles)) * scale

    def unit(x, scale):
        return x / np.linalg.norm(x, axis=-1, keepdims=True) * scale

    x = t["token_emb.weight"][tokens]
    for i in range(L):
        layer = f"layers.{i}.fn."
        fused = norm(x, t[layer + "norm.gamma"]) @ t[layer + "fused_attn_ff_proj.weight"].T
        q, k, v, up, gate = np.split(fused, np.cumsum([N * H, H, H, F]), axis=-1)
        q = q.reshape(-1, N, H).swapaxes(0, 1)
        if layer + "q_scale" in t:
            q, k = unit(q, t[layer + "q_scale"]), unit(k, t[layer + "k_scale"])
        logits = rotate(q, decay) @ rotate(k, 1 / decay).T * query_scale
        logits = np.where(np.tri(len(tokens), dtype=bool), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        attended = (weights / weights.sum(-1, keepdims=True)) @ v
        attended = attended.swapaxes(0, 1).reshape(len(tokens), N * H)
        hidden = gate / (1 + np.exp(-gate)) * up
        x = x + attended @ t[layer + "attn_out.weight"].T + hidden @ t[layer + "ff_out.2.weight"].T
    return norm(x, t["norm.gamma"]) @ t["token_emb.weight"].T


TOKENS = np.random.default_rng(2).integers(V, size=T).astype(np.int32)


def test_logits_of_the_original():
    if not GOLDEN.exists():
        pytest.skip("CALM_TEST_DATA names no folder with golden/palm_pytorch_v0_2_1.npz")
    with np.load(GOLDEN) as golden:
        arrays = dict(golden)
    ids, logits = arrays.pop("__ids").astype(np.int32), arrays.pop("__logits")
    assert_close(in_memory(arrays)(ids), logits, 2e-6)
    for wrong in ({"xpos": False}, {"norm_offset": 1.0}, {"xpos_scale_base": 300.0}):
        with pytest.raises(AssertionError):
            assert_close(in_memory(arrays, **wrong)(ids), logits, 1e-4)


# PaLM-pytorch; PaLM-rlhf-pytorch up to 2024 and since, with and without what it can be made with.
LAYOUTS = {
    "PaLM-pytorch": (in_sequence, {"xpos": False}),
    "rlhf": (dict, {}),
    "rlhf, no xpos": (dict, {"xpos": False}),
    "rlhf, qk norm": (dict, {"qk_norm": True}),
    "rlhf of 2025": (dict, {"offset": 1.0}),
    "rlhf of 2025, qk norm": (dict, {"offset": 1.0, "qk_norm": True}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_independent_forward_pass(layout):
    named, made = LAYOUTS[layout]
    tensors, offset = rlhf(**made), made.get("offset", 0.0)
    expected = numpy_logits(tensors, TOKENS, xpos=made.get("xpos", True), offset=offset)
    right = {} if offset == 0.0 else {"norm_offset": offset}
    assert_close(in_memory(named(tensors), **right)(TOKENS[None])[0], expected, 1e-5)
    wrongs = [(tensors, {"norm_offset": 1 - offset}), (gate_first(tensors), right)]
    if made.get("xpos", True):
        wrongs.append((tensors, {**right, "xpos": False}))
    for changed, wrong in wrongs:
        with pytest.raises(AssertionError):
            assert_close(in_memory(named(changed), **wrong)(TOKENS[None])[0], expected, 1e-4)


def test_positions_that_were_made_not_to_decay():
    """PaLM-rlhf-pytorch stores the decay even of models that do not use it."""
    tensors = rlhf()
    expected = numpy_logits(tensors, TOKENS, xpos=False)
    assert_close(in_memory(tensors, xpos=False)(TOKENS[None])[0], expected, 1e-5)


def test_the_query_scale_of_early_normalised_heads():
    tensors = rlhf(qk_norm=True)
    tensors = {name: x / 3 if name.endswith("q_scale") else x for name, x in tensors.items()}
    expected = numpy_logits(tensors, TOKENS, xpos=True, query_scale=8.0)
    assert_close(in_memory(tensors, query_scale=8.0)(TOKENS[None])[0], expected, 1e-5)


def test_without_buffers_the_layout_says_whether_positions_decay():
    tensors = rlhf(buffers=False)
    assert in_memory(tensors).config.xpos_scale_base == 512
    assert in_memory(in_sequence(tensors)).config.xpos_scale_base is None


@pytest.mark.parametrize("named", [dict, in_sequence])
@pytest.mark.parametrize("absent", ["to_logits.weight", "token_emb.weight"])
def test_a_tied_tensor_that_is_stored_once(named, absent):
    """safetensors keeps one name, which is the head's of PaLM-rlhf-pytorch."""
    tensors = rlhf(xpos=False)
    expected = numpy_logits(tensors, TOKENS, xpos=False)
    del tensors[absent]
    assert_close(in_memory(named(tensors))(TOKENS[None])[0], expected, 1e-5)


def test_the_mlp_before_it_had_a_dropout():
    tensors = rlhf()
    earlier = {name.replace("ff_out.2", "ff_out.1"): array for name, array in tensors.items()}
    expected = numpy_logits(tensors, TOKENS, xpos=True)
    assert_close(in_memory(earlier)(TOKENS[None])[0], expected, 1e-5)


@pytest.mark.parametrize("suffix", ["pt", "bin", "npz", "safetensors"])
def test_every_kind_of_file(tmp_path, suffix):
    tensors, path = rlhf(), tmp_path / f"palm.{suffix}"
    if suffix == "npz":
        np.savez(path, **tensors)
    elif suffix == "safetensors":
        save_file(tensors, path)
    else:
        torch_files.save_tensors(path, tensors)
    calm_jax.convert(path, tmp_path / "model")
    decoder = calm_jax.load(tmp_path / "model")
    expected = numpy_logits(tensors, TOKENS, xpos=True)
    assert_close(decoder(TOKENS[None])[0], expected, 1e-5)
    assert open_source(path).tensors.keys() == tensors.keys()


# What is added to the tensors, and in which layout.
UNFIT = [
    (dict, {"layers.1.fn.norm.beta": np.full(D, 0.1)}, r"layers\.1\.fn\.norm\.beta is not zero"),
    (dict, {"norm.beta": np.full(D, 0.1)}, r"tensor norm\.beta is not zero"),
    (in_sequence, {"norm.beta": np.full(D, 0.1)}, r"tensor 4\.beta is not zero"),
    (
        dict,
        {"to_logits.weight": np.zeros((V, D))},
        r"to_logits\.weight and token_emb\.weight differ",
    ),
    (
        in_sequence,
        {"to_logits.weight": np.zeros((V, D))},
        r"tensors 5\.weight and 0\.weight differ",
    ),
    (
        dict,
        {"finetune_modules.default.0.0.A": np.zeros((D, 8))},
        r"tensor finetune_modules\.default\.0\.0\.A is not part",
    ),
    (
        dict,
        {"layers.0.fn.qkv_lora.default.0.A": np.zeros((D, 8))},
        r"tensor layers\.0\.fn\.qkv_lora\.default\.0\.A is not part",
    ),
    (
        dict,
        {"layers.1.fn.ff_out.1.weight": np.zeros((D, F))},
        r"layers\.1\.fn\.ff_out\.1\.weight is n",
    ),
    (dict, {"layers.1.fn.q_scale": np.ones(H)}, r"tensor layers\.1\.fn\.q_scale is not part"),
    (dict, {"layers.0.fn.q_scale": np.ones(H)}, r"tensor layers\.1\.fn\.q_scale is missing"),
    (dict, {"layers.4.fn.norm.gamma": np.ones(D)}, r"tensor layers\.3\.fn\.norm\.gamma is missing"),
    (
        dict,
        {"layers.2.fn.attn_out.weight": np.zeros((D, 7))},
        r"layers\.2\.fn\.attn_out\.weight has",
    ),
    (
        in_sequence,
        {"layers.2.fn.attn_out.weight": np.zeros((D, 7))},
        r"tensor 3\.fn\.attn_out\.weight has shape \(16, 7\), the config says \(16, 32\)",
    ),
    (
        dict,
        {"layers.0.fn.attn_out.weight": np.zeros((D, 7))},
        r"fused_attn_ff_proj\.weight has 112 rows, layers\.0\.fn\.attn_out\.weight 7 columns",
    ),
    (
        dict,
        {"layers.1.fn.rotary_emb.inv_freq": np.ones(4)},
        r"inv_freq starts with \[1\. 1\. 1\.\], this",
    ),
    (dict, {"layers.1.fn.rotary_emb.inv_freq": 1e5 ** -(np.arange(4) / 4)}, r"inv_freq starts"),
    (
        dict,
        {"layers.1.fn.rotary_emb.scale": np.ones(4)},
        r"scale starts with \[1\. 1\. 1\.\], this",
    ),
]


@pytest.mark.parametrize(("named", "change", "message"), UNFIT)
def test_what_does_not_fit(tmp_path, named, change, message):
    np.savez(tmp_path / "palm.npz", **named(rlhf() | change))
    with pytest.raises(CalmError, match=message):
        calm_jax.convert(tmp_path / "palm.npz", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["palm.npz"]


def test_buffers_rounded_to_half_precision():
    halves = {name: array.astype(np.float16) for name, array in rlhf().items()}
    assert in_memory(halves).config.xpos_scale_base == 512


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (rlhf(), {"norm_offset": "one"}, "norm_offset is 'one'; it must be a finite number"),
        (rlhf(), {"query_scale": 0}, r"query_scale is 0\.0; it must be a number above 0"),
        (rlhf(), {"query_scale": True}, "query_scale is True; it must be a finite number"),
        (rlhf(), {"xpos": 1}, "xpos is 1; it must be True or False"),
        (rlhf(), {"xpos_scale_base": 0}, "xpos_scale_base is 0.0; it must be more than 0"),
        (rlhf(), {"xpos_scale_base": "x"}, "xpos_scale_base is 'x'; it must be a finite number"),
        (
            rlhf(),
            {"xpos": False, "xpos_scale_base": 300},
            "palm.pt: xpos_scale_base is 300, but xpos is False",
        ),
        (
            in_sequence(rlhf(xpos=False)),
            {"xpos": True},
            "palm.pt: xpos is True, but there is rotary_emb.inv_freq without rotary_emb.scale",
        ),
    ],
)
def test_options_that_contradict(tensors, options, message):
    with pytest.raises(CalmError, match=message):
        in_memory(tensors, **options)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_scales_that_speak_against_the_offset(offset):
    source = Source(epath.Path("palm.pt"), "torch", rlhf(offset=offset))
    assert not PalmPytorch().read(source, norm_offset=offset).warnings
    (warning,) = PalmPytorch().read(source, norm_offset=1 - offset).warnings
    assert f"as with norm_offset={offset}, not {1 - offset}" in warning


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gammas_show_the_offset(offset, tmp_path):
    tensors = rlhf(offset=offset)
    np.savez(tmp_path / "palm.npz", **tensors)
    calm_jax.convert(tmp_path / "palm.npz", tmp_path / "model")
    expected = numpy_logits(tensors, TOKENS, xpos=True, offset=offset)
    assert_close(calm_jax.load(tmp_path / "model")(TOKENS[None])[0], expected, 1e-5)


def test_gammas_that_show_no_offset():
    source = Source(epath.Path("palm.pt"), "torch", rlhf(offset=0.5))
    message = r"palm.pt: norm scales average 0\.\d\d, .* option norm_offset=0.0 or norm_offset=1.0$"
    with pytest.raises(CalmError, match=message):
        PalmPytorch().read(source)
    assert PalmPytorch().read(source, norm_offset=1.0).config.norm_offset == 1.0


@pytest.mark.parametrize(
    ("width", "depth", "nominal"),
    [(768, 12, 150e6), (1024, 24, 410e6), (2048, 16, 1e9), (2560, 24, 2e9)],
)
def test_published_sizes(width, depth, nominal):
    """conceptofmind's models: 8 heads of 128, 50,304 rows, 4 x as wide an MLP."""
    inner, hidden = 8 * 128, 4 * width

    def fake(*shape):
        return np.broadcast_to(np.float32(1), shape)

    tensors = {"token_emb.weight": fake(50_304, width), "norm.gamma": fake(width)}
    for i in range(depth):
        layer = f"layers.{i}.fn."
        tensors |= {
            layer + "norm.gamma": fake(width),
            layer + "fused_attn_ff_proj.weight": fake(inner + 256 + 2 * hidden, width),
            layer + "attn_out.weight": fake(width, inner),
            layer + "ff_out.2.weight": fake(width, hidden),
        }
    reading = PalmPytorch().read(Source(epath.Path("palm.pt"), "torch", tensors))
    config = reading.config
    assert (config.num_heads, config.head_dim, config.num_layers) == (8, 128, depth)
    decoder = nnx.eval_shape(lambda: calm_jax.Decoder(config, nnx.Rngs(0)))
    total = count(module_tree(decoder))
    assert total == sum(np.prod(x.shape) for x in tensors.values())
    assert abs(total / nominal - 1) < 0.2
