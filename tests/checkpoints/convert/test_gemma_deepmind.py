"""DeepMind's trees of Gemma against outputs of the `gemma` package, in every layout on disk.

The outputs are by tests/parity/make_gemma_deepmind_golden.py.
"""

import dataclasses
import json
import pathlib
import re

import numpy as np
import orbax.checkpoint as ocp
import pytest
from converting import decoder_in_memory
from etils import epath

import calm_jax
from calm_jax.checkpoints.convert.gemma import Gemma, Gemma2, Gemma3
from calm_jax.checkpoints.convert.gemma_deepmind import GemmaDeepMind
from calm_jax.checkpoints.convert.table import check_names, check_shapes
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.checkpoints.sources.source import Source
from calm_jax.errors import CalmError

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("gemma_deepmind_*.npz"))
# Of the largest logit. The exact gelu in place of the tanh form changes less than 1e-4 of it.
TOLERANCE, SEEN = 4e-6, 4e-5
PERIODS = {"1": 1, "2": 2, "3": 6}  # of the attention pattern, by generation


class Golden:
    """One model of the package: its nested parameters, tokens and logits."""

    def __init__(self, name):
        with np.load(GOLDEN / f"{name}.npz") as file:
            arrays = dict(file)
        self.tokens, self.logits = arrays.pop("tokens"), arrays.pop("logits")
        self.shapes = {kind: json.loads(str(arrays.pop(kind))) for kind in ("flat", "stacked")}
        self.options = json.loads(str(arrays.pop("options")))
        self.nested = arrays
        self.period = PERIODS[name.split("_")[2]]

    def difference(self, decoder):
        """Largest difference of logits over the largest logit."""
        found = np.asarray(decoder(self.tokens))
        return np.max(np.abs(found - self.logits)) / np.max(np.abs(self.logits))


def flat(golden):
    """Dict keys hold slashes, one level of leaves below; MLP leaves are named "w"."""
    tree = {}
    for path, array in golden.nested.items():
        if re.search(r"/mlp/\w+$", path):
            path += "/w"
        name, leaf = path.rsplit("/", 1)
        tree.setdefault(f"transformer/{name}", {})[leaf] = array
    return tree


def stacked(golden):
    tree, layers = {}, {}
    for name, leaves in flat(golden).items():
        match = re.fullmatch(r"transformer/layer_(\d+)/(.*)", name)
        if match is None:
            tree[name] = leaves
            continue
        position = int(match[1]) % golden.period
        for leaf, array in leaves.items():
            key = f"transformer/stacked_layers/attention_type_{position}/{match[2]}"
            layers.setdefault((key, leaf), {})[int(match[1])] = array
    for (name, leaf), arrays in layers.items():
        tree.setdefault(name, {})[leaf] = np.stack([arrays[i] for i in sorted(arrays)])
    return tree


def nested(golden):
    tree = {}
    for path, array in golden.nested.items():
        *keys, leaf = path.split("/")
        node = tree
        for key in keys:
            node = node.setdefault(key, {})
        node[leaf] = array
    return tree


def kauldron(golden):
    moments = {"mu": {"layer_0": {"mlp": {"linear": np.ones((2, 2), np.float32)}}}}
    return {
        "params": nested(golden),
        "step": np.asarray(7, np.int32),
        "opt_state": [moments, {}],
        "collections": {},
    }


def post_trained(golden):
    return {f"rlx_networks/policy_network/{name}": leaves for name, leaves in flat(golden).items()}


def seeing(golden):
    tree = flat(golden)
    tree["transformer/embedder"]["mm_output_embedding"] = np.ones((3, 4), np.float32)
    tree["transformer/embedder/mm_input_projection"] = {"w": np.ones((3, 4), np.float32)}
    tree["transformer/embedder/mm_soft_embedding_norm"] = {"scale": np.ones(3, np.float32)}
    tree["SigLiPFromPatches_0/siglip_encoder/embedding"] = {"kernel": np.ones(3, np.float32)}
    return tree


LAYOUTS = (nested, flat, stacked, kauldron, post_trained, seeing)


def write(tree, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def in_memory(arrays):
    return Source(epath.Path("tree"), "orbax", arrays)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_package_in_every_layout(name, tmp_path):
    golden = Golden(name)
    for layout in LAYOUTS:
        source = open_source(write(layout(golden), tmp_path / layout.__name__))
        assert GemmaDeepMind().recognises(source)
        decoder = decoder_in_memory(GemmaDeepMind(), source, **golden.options)
        assert golden.difference(decoder) <= TOLERANCE, layout.__name__


@pytest.mark.parametrize("name", NAMES)
def test_layouts_of_these_tests_are_those_of_the_package(name):
    golden = Golden(name)
    for layout in (flat, stacked):
        written = {
            f"{key}/{leaf}": list(array.shape)
            for key, leaves in layout(golden).items()
            for leaf, array in leaves.items()
        }
        assert written == golden.shapes[layout.__name__]


@pytest.mark.parametrize(
    ("name", "option", "wrong"),
    [
        ("gemma_deepmind_2_plain", "window", 4),
        ("gemma_deepmind_2_plain", "attention_logit_cap", 0),
        ("gemma_deepmind_2_plain", "final_logit_cap", 0),
        ("gemma_deepmind_2_transposed", "query_scale", 0.5),
        ("gemma_deepmind_3", "rope_factor", 1),
        ("gemma_deepmind_3", "window", 5),
    ],
)
def test_every_option_is_seen_in_the_logits(name, option, wrong):
    golden = Golden(name)
    options = {**golden.options, option: wrong}
    decoder = decoder_in_memory(GemmaDeepMind(), in_memory(golden.nested), **options)
    assert golden.difference(decoder) > SEEN


def test_a_folder_is_converted_bit_for_bit(tmp_path):
    golden = Golden("gemma_deepmind_3")
    folder = write(stacked(golden), tmp_path / "tree")
    calm_jax.convert(folder, tmp_path / "frozen", **golden.options)
    decoder = calm_jax.load(tmp_path / "frozen")
    assert golden.difference(decoder) <= TOLERANCE
    embedding = np.asarray(decoder.embedding[...])
    assert np.array_equal(embedding, golden.nested["embedder/input_embedding"])


def tree_of_zeros(V, D, F, N, K, H, L, generation, transposed):
    """The shapes of a published tree, without its memory."""
    shapes = {"embedder/input_embedding": (V, D), "final_norm/scale": (D,)}
    for layer in (f"layer_{i}" for i in range(L)):
        if N == K:
            shapes[f"{layer}/attn/qkv_einsum/w"] = (3, N, D, H)
        else:
            shapes[f"{layer}/attn/q_einsum/w"] = (N, D, H)
            shapes[f"{layer}/attn/kv_einsum/w"] = (2, K, D, H)
        shapes[f"{layer}/attn/attn_vec_einsum/w"] = (N, H, D)
        shapes[f"{layer}/mlp/gating_einsum"] = (2, F, D) if transposed else (2, D, F)
        shapes[f"{layer}/mlp/linear"] = (F, D)
        norms = ["pre_attention_norm", "pre_ffw_norm"]
        norms += ["post_attention_norm", "post_ffw_norm"] if generation > 1 else []
        for norm in norms:
            shapes[f"{layer}/{norm}/scale"] = (D,)
        if generation == 3:
            shapes[f"{layer}/attn/_query_norm/scale"] = (H,)
            shapes[f"{layer}/attn/_key_norm/scale"] = (H,)
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


# Generation, layers, width, MLP width, heads, key heads, head width; and of Hugging Face's config
# what the sizes do not tell.
LONG = {"sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
SHORT = {"sliding_window": 512, "rope_scaling": None}
PUBLISHED = {
    "1 2B": (1, 18, 2048, 16384, 8, 1, 256, {}),
    "1 7B": (1, 28, 3072, 24576, 16, 16, 256, {}),
    "2 2B": (2, 26, 2304, 9216, 8, 4, 256, {"query_pre_attn_scalar": 256}),
    "2 9B": (2, 42, 3584, 14336, 16, 8, 256, {"query_pre_attn_scalar": 256}),
    "2 27B": (2, 46, 4608, 36864, 32, 16, 128, {"query_pre_attn_scalar": 144}),
    "3 270M": (3, 18, 640, 2048, 4, 1, 256, {**SHORT, "query_pre_attn_scalar": 256}),
    "3 1B": (3, 26, 1152, 6912, 4, 1, 256, {**SHORT, "query_pre_attn_scalar": 256}),
    "3 4B": (3, 34, 2560, 10240, 8, 4, 256, {**LONG, "query_pre_attn_scalar": 256}),
    "3 12B": (3, 48, 3840, 15360, 16, 8, 256, {**LONG, "query_pre_attn_scalar": 256}),
    "3 27B": (3, 62, 5376, 21504, 32, 16, 128, {**LONG, "query_pre_attn_scalar": 168}),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_are_what_hugging_face_says_of_them(size):
    generation, L, D, F, N, K, H, others = PUBLISHED[size]
    rows = 262_144 if generation == 3 else 256_128
    transposed = size not in ("1 2B", "1 7B", "2 2B")
    source = in_memory(tree_of_zeros(rows, D, F, N, K, H, L, generation, transposed))
    reading = GemmaDeepMind().read(source)
    assert reading.warnings == ()
    assert reading.config.vocab_size == rows  # padding rows stay
    check_names(reading.rules, reading.unused, L, reading.tensors, size)
    check_shapes(reading.rules, reading.config, reading.tensors, size)
    theirs = {
        "hidden_size": D,
        "num_hidden_layers": L,
        "intermediate_size": F,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "vocab_size": rows - 128 if generation < 3 else 262_208,
        **others,
    }
    family = {1: Gemma, 2: Gemma2, 3: Gemma3}[generation]()
    expected = family.decoder_config(theirs, "config.json")
    assert dataclasses.replace(reading.config, vocab_size=expected.vocab_size) == expected


def test_what_the_tree_of_an_unknown_size_does_not_show_must_be_given():
    """With the values of other sizes the logits could be wrong, and nobody would know."""
    source = in_memory(Golden("gemma_deepmind_3").nested)
    options = {
        "query_scale": "0.5",
        "window": "512",
        "attention_logit_cap": "0",
        "final_logit_cap": "0",
        "rope_factor": "1",
    }
    given = {}
    for name, value in options.items():
        listed = " ".join(f"{k}={v}" for k, v in options.items() if k not in given)
        message = f"no Gemma 3 of 7 layers of width 12 was published, .*: {listed}$"
        with pytest.raises(CalmError, match=message):
            GemmaDeepMind().read(source, **given)
        given[name] = float(value) if "." in value else int(value)
    assert GemmaDeepMind().read(source, **given).config.window == 512


def square():
    """A tree whose gating does not tell its layout: width and MLP width are both 16."""
    return tree_of_zeros(V=40, D=16, F=16, N=4, K=2, H=4, L=2, generation=3, transposed=True)


@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_the_option_tells_a_gating_that_shapes_cannot(layout):
    gate_up = np.random.default_rng(0).normal(size=(2, 16, 16)).astype(np.float32)
    tree = square() | {f"layer_{i}/mlp/gating_einsum": gate_up for i in range(2)}
    options = {**Golden("gemma_deepmind_3").options, "gating": layout}
    decoder = decoder_in_memory(GemmaDeepMind(), in_memory(tree), **options)
    up_DF = gate_up[1].T if layout == "transposed" else gate_up[1]
    assert np.array_equal(decoder.layers.mlp.up[1], up_DF)


def without(tree, name):
    return {key: value for key, value in tree.items() if key != name}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: without(t, "layer_1/mlp/linear"), {}, "layer_1/mlp/linear is missing"),
        (lambda t: without(t, "layer_0/mlp/linear"), {}, "layer_0/mlp/linear is missing"),
        (lambda t: without(t, "embedder/input_embedding"), {}, "input_embedding is missing"),
        (lambda t: t | {"layer_0/altup/w": t["final_norm/scale"]}, {}, "layer_0/altup/w"),
        (lambda t: t | {"layer_0/mlp/linear/w": t["final_norm/scale"]}, {}, "twice"),
        (lambda t: t | {"layer_0/mlp/linear": t["final_norm/scale"]}, {}, r"shape \(12,\)"),
        (lambda t: t | {"final_norm/scale": t["layer_0/mlp/linear"]}, {}, "final_norm/scale"),
        (dict, {"gating": "plain"}, r"gating=plain: .*transposed \(16, 12\)"),
        (dict, {"gating": "sideways"}, "gating=sideways"),
        (dict, {"window": "wide"}, "options: window is 'wide'; it must be a whole number"),
        (dict, {"window": 4.5}, r"options: window is 4\.5; it must be a whole number"),
        (dict, {"window": 1e400}, "options: window is inf; it must be a whole number"),
        (dict, {"window": 10**400}, "options: window is 10.*; it must be a whole number"),
        (dict, {"query_scale": 0}, "options: query_scale is 0; it must be a finite number above 0"),
        (dict, {"query_scale": -1}, "options: query_scale is -1; it must be a finite number"),
        (dict, {"query_scale": 10**400}, "options: query_scale is 10.*; it must be a finite"),
        (dict, {"rope_factor": float("nan")}, "options: rope_factor is nan; it must be a finite"),
        (dict, {"final_logit_cap": -1.0}, r"options: final_logit_cap is -1\.0; it must be"),
        (dict, {"final_logit_cap": True}, r"options: final_logit_cap is True; it must be"),
        (lambda t: square(), {}, "give the option gating=plain or"),
    ],
)
def test_bad_trees_and_options_are_refused(change, options, message):
    golden = Golden("gemma_deepmind_3")
    with pytest.raises(CalmError, match=message):
        decoder_in_memory(
            GemmaDeepMind(), in_memory(change(golden.nested)), **{**golden.options, **options}
        )


@pytest.mark.parametrize(
    ("name", "option", "generation"),
    [
        ("1_multi_head", "window", 1),
        ("1_multi_head", "rope_factor", 1),
        ("2_plain", "rope_factor", 2),
    ],
)
def test_what_a_generation_does_not_have_is_no_option_of_it(name, option, generation):
    tree = Golden(f"gemma_deepmind_{name}").nested
    with pytest.raises(CalmError, match=f"{option}=4: tree is Gemma {generation}, which has none"):
        GemmaDeepMind().read(in_memory(tree), **{option: 4})
