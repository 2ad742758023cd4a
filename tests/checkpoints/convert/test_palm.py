"""PaLM's fused layout against a second forward pass, in every layout on disk, and refused trees."""

import os
import pathlib

import ml_dtypes
import numpy as np
import pytest
import t5x_checkpoints
from converting import decoder_in_memory
from etils import epath
from flax import nnx

from calm_jax.checkpoints.convert.conversion import convert
from calm_jax.checkpoints.convert.palm import Palm
from calm_jax.checkpoints.convert.table import check_names, check_shapes, sizes
from calm_jax.checkpoints.frozen import load
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.checkpoints.sources.source import Source
from calm_jax.errors import CalmError
from calm_jax.models import Decoder, DecoderConfig
from calm_jax.models.parameters import Structure, count

V, D, N, H, F_, L = 24, 12, 3, 4, 5, 2  # F_: hidden units of a head
TOKENS = np.random.default_rng(1).integers(V, size=(2, 9)).astype(np.int32)
TOLERANCE = 1e-4  # of the largest logit


def random_tree(seed=0, dtype=np.float32, *, offset=1.0):
    rng = np.random.default_rng(seed)
    shapes = {
        "decoder/token_embedder/embedding": (V, D),
        "decoder/decoder_norm/scale": (D,),
    }
    for i in range(L):
        shapes |= {
            f"decoder/layers_{i}/layer_norm/scale": (D,),
            f"decoder/layers_{i}/q_wi_fused/kernel": (D, N, 2 * F_ + H),
            f"decoder/layers_{i}/kv_fused/kernel": (D, 1, 2 * H),
            f"decoder/layers_{i}/o_wo_fused/kernel": (N, F_ + H, D),
        }
    tree = {}
    for name, shape in shapes.items():
        std = 1.0 if "embedding" in name else 0.3
        tree[name] = std * rng.normal(size=shape) + (1 - offset if "norm" in name else 0.0)
    return {name: array.astype(dtype) for name, array in tree.items()}


def scanned(tree, axis=1):
    """The same tree with its layers stacked."""
    stacked = {name: x for name, x in tree.items() if "layers_" not in name}
    for name in tree:
        if name.startswith("decoder/layers_0/"):
            parts = [tree[name.replace("layers_0", f"layers_{i}")] for i in range(L)]
            stacked[name.replace("layers_0", "decoder")] = np.stack(parts, axis)
    return stacked


def in_memory(tree):
    return Source(epath.Path("/memory/palm"), "npz", tree)


def reference_logits(
    tree, tokens, *, offset=1.0, query_scale=None, logit_scale=None, depth=L, heads=N, width=H
):
    """Written down from PaLM's equations on flaxformer's tree, in float64, head by head."""

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * (offset + scale)

    def rotate(x):  # [T, H]
        half = width // 2
        angle = np.arange(len(x))[:, None] * 10_000.0 ** (-np.arange(half) / half)
        first, second = x[:, :half], x[:, half:]
        return np.concatenate(
            [
                first * np.cos(angle) - second * np.sin(angle),
                second * np.cos(angle) + first * np.sin(angle),
            ],
            -1,
        )

    tree = {name: np.asarray(x, np.float64) for name, x in tree.items()}
    table = tree["decoder/token_embedder/embedding"]
    query_scale = width**-0.5 if query_scale is None else query_scale
    logits = []
    for row in tokens:
        x = table[row]
        for i in range(depth):
            at = f"decoder/layers_{i}/"
            y = norm(x, tree[at + "layer_norm/scale"])
            kv = y @ tree[at + "kv_fused/kernel"][:, 0]
            key, value = rotate(kv[:, :width]), kv[:, width:]
            for n in range(heads):
                fused = y @ tree[at + "q_wi_fused/kernel"][:, n]
                hidden = (fused.shape[-1] - width) // 2
                query = rotate(fused[:, :width])
                gate, up = fused[:, width : width + hidden], fused[:, width + hidden :]
                scores = query_scale * query @ key.T
                scores[np.triu_indices(len(row), 1)] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                attended = weights / weights.sum(-1, keepdims=True) @ value
                both = np.concatenate([attended, gate / (1 + np.exp(-gate)) * up], -1)
                x = x + both @ tree[at + "o_wo_fused/kernel"][n]
        x = norm(x, tree.get("decoder/decoder_norm/scale", 1 - offset))
        scale = table.shape[1] ** -0.5 if logit_scale is None else logit_scale
        logits.append(scale * x @ tree.get("decoder/logits_dense/kernel", table.T))
    return np.stack(logits)


def assert_same_logits(found, expected):
    assert np.max(np.abs(found - expected)) <= TOLERANCE * np.max(np.abs(expected))


def canonical(source, **options):
    """(target, layer) -> array, with every check that a conversion makes on the way."""
    assert Palm().recognises(source)
    reading = Palm().read(source, **options)
    where = str(source.path)
    check_names(reading.rules, reading.unused, reading.config.num_layers, reading.tensors, where)
    check_shapes(reading.rules, reading.config, reading.tensors, where)
    return {
        (target, layer): array
        for rule in reading.rules
        for layer, name in enumerate(rule.names(reading.config.num_layers))
        if name in reading.tensors
        for target, array in rule.split(reading.tensors[name][...], sizes(reading.config))
    }


def assert_same_arrays(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype
        np.testing.assert_array_equal(found[key], array)


def without(tree, *names):
    return {name: x for name, x in tree.items() if name not in names}


@pytest.mark.parametrize("stack", [lambda tree: tree, scanned])
def test_logits_of_flaxformer(stack):
    data = os.environ.get("CALM_TEST_DATA")
    if not data:
        pytest.skip("CALM_TEST_DATA, the folder with golden/, is not set")
    golden = np.load(pathlib.Path(data) / "golden" / "palm_flaxformer_unscanned.npz")
    tree = {name: golden[name] for name in golden if name.startswith("decoder/")}
    if stack is scanned:
        layers = {i for i in range(99) if f"decoder/layers_{i}/layer_norm/scale" in tree}
        tree = {
            **{name: x for name, x in tree.items() if "layers_" not in name},
            **{
                name.replace("layers_0", "decoder"): np.stack(
                    [tree[name.replace("layers_0", f"layers_{i}")] for i in sorted(layers)], 1
                )
                for name in tree
                if "layers_0" in name
            },
        }
    logits = decoder_in_memory(Palm(), in_memory(tree))(golden["ids"])
    assert_same_logits(logits, golden["logits"])


TREES = {
    "as PaLM": (random_tree(), {}),
    "no last scale": (without(random_tree(), "decoder/decoder_norm/scale"), {}),
    "plain norms": (random_tree(offset=0.0), {"norm_offset": 0.0}),
    "plain norms, no last scale": (
        without(random_tree(offset=0.0), "decoder/decoder_norm/scale"),
        {"norm_offset": 0.0},
    ),
    "scales given": (random_tree(), {"query_scale": 1.0, "logit_scale": 0.5}),
    "own head": (
        random_tree()
        | {"decoder/logits_dense/kernel": np.random.default_rng(3).normal(size=(D, V))},
        {},
    ),
}


@pytest.mark.parametrize("case", TREES)
def test_logits_of_the_equations(case):
    tree, options = TREES[case]
    decoder = decoder_in_memory(Palm(), in_memory(tree), **options)
    expected = reference_logits(
        tree,
        TOKENS,
        offset=options.get("norm_offset", 1.0),
        query_scale=options.get("query_scale"),
        logit_scale=options.get("logit_scale", 1.0 if case == "own head" else None),
    )
    assert_same_logits(decoder(TOKENS), expected)


@pytest.fixture(scope="module")
def tree():
    return random_tree(dtype=ml_dtypes.bfloat16)


def npz(path, tree):
    np.savez(path.with_suffix(".npz"), **tree)
    return path.with_suffix(".npz")


def sliced(path, tree):
    """Scanned, in chunks that span all layers and half of the first axis."""
    folder = path / "checkpoint_10"
    t5x_checkpoints.write_t5x(folder, without(tree, "decoder/decoder/q_wi_fused/kernel"))
    name = "decoder/decoder/q_wi_fused/kernel"
    leaves = {n: t5x_checkpoints.spec(n, x) for n, x in tree.items()}
    leaves[name] = t5x_checkpoints.spec(name, tree[name], chunks=(D // 2, L, 2, 2 * F_ + H))
    path, metadata = leaves[name]["kvstore"]["path"], leaves[name]["metadata"]
    t5x_checkpoints.write_zarr(
        folder, path, tree[name], "bfloat16", metadata["chunks"], metadata["compressor"]
    )
    return t5x_checkpoints.write_msgpack(folder, leaves)


LAYOUTS = {
    "apart": t5x_checkpoints.write_t5x,
    "version 2": lambda p, t: t5x_checkpoints.write_t5x(p, t, version=2),
    "gfile": lambda p, t: t5x_checkpoints.write_t5x(p, t, driver="gfile"),
    "placeholders": t5x_checkpoints.write_placeholders,
    "Orbax": t5x_checkpoints.write_t5x_on_orbax,
    "npz": npz,
    "stacked": lambda p, t: t5x_checkpoints.write_t5x(p, scanned(t)),
    "stacked, in chunks": lambda p, t: sliced(p, scanned(t)),
    "stacked, version 2": lambda p, t: t5x_checkpoints.write_t5x(p, scanned(t), version=2),
    "stacked, placeholders": lambda p, t: t5x_checkpoints.write_placeholders(p, scanned(t)),
    "stacked, Orbax": lambda p, t: t5x_checkpoints.write_t5x_on_orbax(p, scanned(t)),
    "stacked, npz": lambda p, t: npz(p, scanned(t)),
    "layers first": lambda p, t: t5x_checkpoints.write_t5x(p, scanned(t, 0)),
    "layers first, npz": lambda p, t: npz(p, scanned(t, 0)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_arrays(tmp_path, tree, layout):
    source = open_source(LAYOUTS[layout](tmp_path / "palm", tree))
    options = {"scan_axis": 0} if layout.startswith("layers first") else {}
    assert_same_arrays(canonical(source, **options), canonical(in_memory(tree)))


def test_whole_paths_of_t5x(tmp_path, tree):
    whole = {f"optimizer/target/{name}": x for name, x in tree.items()}
    whole |= {f"optimizer/state/param_states/{name}/v": np.zeros(3) for name in tree}
    source = open_source(npz(tmp_path / "palm", whole))
    assert_same_arrays(canonical(source), canonical(in_memory(tree)))


def test_converted_folder(tmp_path, tree):
    source = t5x_checkpoints.write_t5x(tmp_path / "run" / "checkpoint_5", scanned(tree))
    convert(source.parent, tmp_path / "frozen")
    decoder = load(tmp_path / "frozen", dtype="float32")
    assert_same_logits(decoder(TOKENS), reference_logits(tree, TOKENS))


def quantised(tree, axis=None, scale_dtype=np.float32):
    """(tree with int8 kernels, stacked along `axis`; the floats that they stand for)."""
    stored, meant = {}, {}
    for name, x in tree.items():
        if not name.endswith("/kernel"):
            stored[name] = meant[name] = x
            continue
        # One scale an output feature: all inputs share it.
        inputs = (0, 1) if "o_wo" in name else 0
        scale = (np.max(np.abs(x), axis=inputs, keepdims=True) / 127).astype(scale_dtype)
        integers = np.round(x / scale.astype(np.float32)).astype(np.int8)
        stored[name.replace("kernel", "qkernel")] = integers
        stored[name.replace("kernel", "qscale")] = scale
        meant[name] = integers.astype(np.float32) * scale.astype(np.float32)
    return (stored if axis is None else scanned(stored, axis)), meant


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_int8_kernels(tmp_path, axis, scale_dtype):
    stored, meant = quantised(random_tree(), axis, scale_dtype)
    source = open_source(t5x_checkpoints.write_t5x(tmp_path / "checkpoint_1", stored))
    found = canonical(source, scan_axis=0 if axis == 0 else 1)
    assert_same_arrays(found, canonical(in_memory(meant)))


@pytest.mark.parametrize(
    "depth, width, heads, total",
    [
        (32, 4096, 16, 8_632_532_992),
        (64, 8192, 32, 62_496_702_464),
        (118, 18432, 48, 540_358_815_744),
    ],
)
def test_parameter_counts_of_palm(depth, width, heads, total):
    """The models of the paper's Table 1, whose last norm has no scale and ours has one."""

    class Shape:
        dtype = np.dtype(np.float32)

        def __init__(self, *shape):
            self.shape = shape

    hidden = 4 * width // heads
    source = in_memory(
        {
            "decoder/token_embedder/embedding": Shape(256128, width),
            "decoder/decoder/q_wi_fused/kernel": Shape(width, depth, heads, 2 * hidden + 256),
            "decoder/decoder/kv_fused/kernel": Shape(width, depth, 1, 512),
            "decoder/decoder/o_wo_fused/kernel": Shape(heads, depth, hidden + 256, width),
        }
    )
    config = Palm().read(source).config
    tree = Structure(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))).abstract()
    assert count(tree) == total + width
    assert config == DecoderConfig.palm(
        vocab_size=256128,
        embed_dim=width,
        num_layers=depth,
        num_heads=heads,
        head_dim=256,
        mlp_dim=4 * width,
    )


@pytest.mark.parametrize(
    "stored, given, warns",
    [(1.0, 1.0, False), (0.0, 0.0, False), (1.0, 0.0, True), (0.0, 1.0, True)],
)
def test_norm_scales_that_contradict_the_offset(stored, given, warns):
    tree = scanned(random_tree(offset=stored))
    warnings = Palm().read(in_memory(tree), norm_offset=given).warnings
    assert len(warnings) == warns
    assert all(f"as with norm_offset={stored}, not {given}" in line for line in warnings)


@pytest.mark.parametrize("stored", [0.0, 1.0])
def test_norm_scales_show_the_offset(stored):
    """Scales near 0 are added to 1; the family's own offset, 1, is not worth a warning."""
    reading = Palm().read(in_memory(scanned(random_tree(offset=stored))))
    assert reading.config.norm_offset == stored
    assert [f"read with norm_offset={stored}" in line for line in reading.warnings] == (
        [] if stored else [True]
    )


def test_norm_scales_that_show_no_offset(tmp_path):
    tree = random_tree(offset=0.5)
    message = r"norm scales average 0\.\d\d, .* option norm_offset=0.0 or norm_offset=1.0$"
    np.savez(tmp_path / "palm.npz", **tree)
    with pytest.raises(CalmError, match=message):
        convert(tmp_path / "palm.npz", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["palm.npz"]
    for given in (0.0, 1.0, 0.5):
        reading = Palm().read(in_memory(tree), norm_offset=given)
        assert (reading.config.norm_offset, reading.warnings) == (given, ())


def test_opening_reads_only_the_norm_scales():
    class Unread:
        def __init__(self, array):
            self.shape, self.dtype = array.shape, array.dtype

    tree = random_tree()
    tree = {name: x if "layer_norm" in name else Unread(x) for name, x in tree.items()}
    assert Palm().read(in_memory(tree)).config.num_layers == L


def test_ambiguous_scan_axis_is_as_it_is_given():
    """As many layers as the width has features, and as heads: shapes tell nothing."""
    rng = np.random.default_rng(0)
    tree = {
        "decoder/token_embedder/embedding": rng.normal(size=(V, 4)),
        "decoder/decoder/layer_norm/scale": rng.normal(size=(4, 4)),
        "decoder/decoder/q_wi_fused/kernel": rng.normal(size=(4, 4, 4, 8)),
        "decoder/decoder/kv_fused/kernel": rng.normal(size=(4, 4, 1, 4)),
        "decoder/decoder/o_wo_fused/kernel": rng.normal(size=(4, 4, 5, 4)),
    }
    for axis in (0, 1):
        query = canonical(in_memory(tree), scan_axis=axis)["layers/attention/query", 2]
        expected = np.take(tree["decoder/decoder/q_wi_fused/kernel"], 2, axis)[..., :2]
        np.testing.assert_array_equal(query, expected)


Q_WI, O_WO = "decoder/layers_0/q_wi_fused/kernel", "decoder/layers_0/o_wo_fused/kernel"
FLOATS = random_tree()
INT8, _ = quantised(FLOATS)
BAD = {
    "other scan axis": (
        scanned(FLOATS, 0),
        {},
        rf"scan_axis=1, tensor decoder/decoder/\S+ of shape .* model width of {L}, the embedding "
        rf"has {D}; try scan_axis=0",
    ),
    "other scan axis, layers first": (
        scanned(FLOATS),
        {"scan_axis": 0},
        rf"scan_axis=0, tensor .* width of {L}, the embedding has {D}; try scan_axis=1",
    ),
    "depths differ": (
        scanned(FLOATS) | {"decoder/decoder/o_wo_fused/kernel": np.zeros((N, L + 1, F_ + H, D))},
        {},
        rf"decoder/decoder/o_wo_fused/kernel has {L + 1} layers and decoder/\S+ {L}",
    ),
    "stacked without axis": (
        scanned(FLOATS) | {"decoder/decoder/layer_norm/scale": np.zeros(D)},
        {},
        rf"layer_norm/scale has shape \({D},\), without an axis of layers",
    ),
    "stacked and apart": (
        scanned(FLOATS) | FLOATS,
        {},
        r"tensor decoder/layers_0/\S+ is also in decoder/decoder/\S+",
    ),
    "unknown scan axis": (FLOATS, {"scan_axis": 2}, "scan_axis is 2; it must be 0 or 1"),
    "strange number": (FLOATS, {"norm_offset": "one"}, "norm_offset is 'one'; it must be a finite"),
    "huge number": (FLOATS, {"norm_offset": 10**400}, "norm_offset is 10.*; it must be a finite"),
    "no logits": (FLOATS, {"logit_scale": 0}, r"logit_scale is 0\.0; it must be a number above 0"),
    "no queries": (FLOATS, {"query_scale": -1}, r"query_scale is -1\.0; it must be a number above"),
    "relative positions": (
        FLOATS | {"decoder/layers_0/relpos_bias/rel_embedding": np.zeros((N, 32))},
        {},
        "relpos_bias/rel_embedding is a relative position bias, which is not supported",
    ),
    "sequential": (
        {"decoder/layers_0/pre_self_attention_layer_norm/scale": np.zeros(D)},
        {},
        "sequential decoder of t5x/examples/decoder_only",
    ),
    "no embedding": (
        without(FLOATS, "decoder/token_embedder/embedding"),
        {},
        "tensor decoder/token_embedder/embedding is missing",
    ),
    "no first layer": (without(FLOATS, Q_WI), {}, f"tensor {Q_WI} is missing"),
    "missing in a layer": (
        without(FLOATS, "decoder/layers_1/kv_fused/kernel"),
        {},
        "tensor decoder/layers_1/kv_fused/kernel is missing",
    ),
    "unknown tensor": (
        FLOATS | {"decoder/layers_1/bias": np.zeros(D)},
        {},
        "tensor decoder/layers_1/bias is not part of the model",
    ),
    "widths of heads": (
        FLOATS | {O_WO: np.zeros((N, 2 * F_ + H, D))},
        {},
        rf"has {2 * F_ + H} features in .*q_wi_fused/kernel and {2 * F_ + H} in o_wo_fused; "
        rf".* H = {2 * F_ + H}, f = 0",
    ),
    "keys of another width": (
        FLOATS | {"decoder/layers_1/kv_fused/kernel": np.zeros((D, 1, 2 * H + 2))},
        {},
        rf"kv_fused/kernel has shape \({D}, 1, {2 * H + 2}\), the config says \({D}, 1, {2 * H}\)",
    ),
    "flat kernel": (
        FLOATS | {Q_WI: np.zeros((D, N * (2 * F_ + H)))},
        {},
        rf"{Q_WI} has shape \({D}, {N * (2 * F_ + H)}\), not 3 axes",
    ),
    "no scale": (
        without(INT8, "decoder/layers_0/q_wi_fused/qscale"),
        {},
        "decoder/layers_0/q_wi_fused/qscale is missing, which decoder/layers_0/q_wi_fused/qkernel",
    ),
    "scale of another shape": (
        INT8 | {"decoder/layers_0/q_wi_fused/qscale": np.ones((1, N, 3), np.float32)},
        {},
        rf"q_wi_fused/qscale of a layer has shape \(1, {N}, 3\), which does not scale \({D}, ",
    ),
    "wide integers": (
        INT8 | {"decoder/layers_0/q_wi_fused/qkernel": np.ones((D, N, 2 * F_ + H), np.int32)},
        {},
        "tensor decoder/layers_0/q_wi_fused/qkernel is int32, not int8",
    ),
    "floats and integers": (
        INT8 | {Q_WI: FLOATS[Q_WI]},
        {},
        f"tensor {Q_WI} is also there as int8",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case):
    tree, options, message = BAD[case]
    with pytest.raises(CalmError, match=message) as error:
        canonical(in_memory(tree), **options)
    assert "\n" not in str(error.value)
