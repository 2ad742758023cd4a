"""Models whose every parameter is random, norms, biases and gates too, so that none can hide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm_jax.models import CompositionConfig, Decoder, DecoderConfig, Inputs, compose
from calm_jax.models.parameters import Structure, module_tree, path_name

SIZES = {"vocab_size": 24, "embed_dim": 16, "num_heads": 4, "head_dim": 8, "mlp_dim": 20}


def palm(**fields) -> DecoderConfig:
    return DecoderConfig.palm(**{**SIZES, "num_layers": 3, **fields})


def llama(**fields) -> DecoderConfig:
    return DecoderConfig.llama(**{**SIZES, "num_layers": 3, "num_kv_heads": 2, **fields})


def gemma(**fields) -> DecoderConfig:
    return DecoderConfig.gemma(**{**SIZES, "num_layers": 3, "num_kv_heads": 4, **fields})


@functools.cache
def decoder_structure(config) -> Structure:
    return Structure(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))


@functools.cache
def composed_structure(anchor, augments, configs) -> Structure:
    def make():
        models = [Decoder(config, nnx.Rngs(0)) for config in (anchor, *augments)]
        return compose(models[0], models[1:], configs, rngs=nnx.Rngs(0))

    return Structure(nnx.eval_shape(make))


def random_tree(structure: Structure, seed: int):
    """Random values for every array; norms and gates around one."""
    random = np.random.default_rng(seed)

    def draw(path, abstract):
        name = path_name(path)
        around = 1.0 if "norm" in name or ("bridge" in name and name.endswith("gate")) else 0.0
        values = around + 0.2 * random.normal(size=abstract.shape)
        return jax.device_put(np.asarray(values, abstract.dtype))

    return jax.tree.map_with_path(draw, structure.abstract())


def random_decoder(config, seed=0) -> Decoder:
    structure = decoder_structure(config)
    return structure.merge(random_tree(structure, seed))


def random_composed(anchor, augments, configs, seed=0):
    """A composed model of decoder configs."""
    configs = (configs,) if isinstance(configs, CompositionConfig) else tuple(configs)
    structure = composed_structure(anchor, tuple(augments), configs)
    return structure.merge(random_tree(structure, seed))


def connection_parameters(composed) -> dict:
    """{(augment, layer, anchor layer): the bridge's parameters of that connection}."""
    tree = jax.tree.map(np.asarray, module_tree(composed.bridge))
    found = {}
    for number, round_ in enumerate(composed.plan.rounds):
        for position, entry in enumerate(round_.entries):
            arrays = tree["rounds"][str(number)][str(position)]
            for step, c in enumerate(entry):
                found[c.augment, c.layer, c.anchor_layer] = (
                    jax.tree.map(lambda x, step=step: x[step], arrays) if round_.stacked else arrays
                )
    return found


def packed_batch(vocab_size=SIZES["vocab_size"]):
    """Tokens, positions, segments and prompt [3, 11]: packed rows, padding at either end."""
    segments = np.array(
        [[1] * 5 + [2] * 4 + [0] * 2, [1] * 11, [0, 0] + [3] * 3 + [1] * 5 + [0]], np.int32
    )
    starts = [np.flatnonzero(np.r_[True, row[1:] != row[:-1]]) for row in segments]
    positions = np.stack(
        [
            np.arange(11) - start[np.searchsorted(start, np.arange(11), side="right") - 1]
            for start in starts
        ]
    )
    prompt = (positions < 2) & (segments != 0) & (segments != 3)
    tokens = np.random.default_rng(7).integers(vocab_size, size=segments.shape)
    return tuple(np.asarray(x, np.int32) for x in (tokens, positions, segments, prompt))


def as_inputs(tokens, positions=None, segments=None, prompt=None) -> Inputs:
    """What models read, of a batch as `packed_batch` makes it."""
    return Inputs(
        jnp.asarray(tokens), positions_BT=positions, segments_BT=segments, prompt_mask_BT=prompt
    )


def assert_close(found, expected, tolerance=5e-5):
    """The largest difference is within `tolerance` of the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    difference = np.max(np.abs(found - expected))
    assert difference <= tolerance * np.max(np.abs(expected)), difference
