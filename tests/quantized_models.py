"""Quantized decoders, and in numpy what their arrays stand for."""

import dataclasses

import jax
import numpy as np
from random_models import decoder_structure, gemma, llama, palm

from calm_jax.models import Decoder
from calm_jax.models.parameters import Structure, insert, module_tree, path_name
from calm_jax.models.quantized import quantized_leaves

DECODERS = {
    "palm": palm(),
    "llama": llama(),
    "gemma": gemma(),
    "gemma 3": gemma(num_kv_heads=1, qk_norm="rms", post_norms=True, window=2, final_logit_cap=3.0),
    "qwen 2": llama(attention_bias=True),
    "gpt-j": palm(
        num_kv_heads=4, norm="layer", norm_bias=True, norm_offset=0.0, gated_mlp=False,
        activation="gelu_tanh", mlp_bias=True, rope="interleaved", rope_dim=4, tied_head=False,
        head_bias=True,
    ),
    "all biases": llama(attention_bias=True, output_bias=True, mlp_bias=True, norm_bias=True),
}  # fmt: skip

# How many of the last dimensions a product keeps; the embedding is read row by row.
KEPT = {
    "query": 2, "key": 2, "value": 2, "output": 1, "gate": 1, "up": 1, "down": 1, "head": 1,
    "embedding": 0,
}  # fmt: skip


def flat(tree):
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def nested(leaves):
    tree = {}
    for path, leaf in leaves.items():
        insert(tree, path, leaf)
    return tree


def with_weights(config, kind):
    return dataclasses.replace(config, weights=kind)


def quantized(decoder: Decoder, kind: str) -> Decoder:
    """The decoder of a float one with its matrices quantized, its layers whole."""
    structure = decoder_structure(with_weights(decoder.config, kind))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: here, structure.abstract())
    leaves = quantized_leaves(flat(module_tree(decoder)).items(), Structure(decoder), places, kind)
    return structure.merge(nested(dict(leaves)))


def int4_values(packed, groups, axis):
    """The integers in bytes, -8 to 7: each group's first half in low bits, its second in high."""
    values = []
    for group in np.split(packed, groups, axis):
        values += [group & 15, group >> 4]
    values = np.concatenate(values, axis).astype(np.int8)
    return np.where(values > 7, values - 16, values)


def of_int4(packed, scale, axis):
    """The float32 weights that packed values and their scales stand for."""
    values = int4_values(packed, scale.shape[axis], axis).astype(np.float32)
    repeats = values.shape[axis] // scale.shape[axis]
    return values * np.repeat(scale.astype(np.float32), repeats, axis)


def stood_for(tree):
    """The float tree that a quantized decoder's tree stands for, q s, by numpy."""
    leaves = {path: np.asarray(leaf) for path, leaf in flat(tree).items()}
    for path, leaf in list(leaves.items()):
        kept = KEPT.get(path.split("/")[-1])
        if leaf.dtype == np.uint8:
            leaves[path] = of_int4(leaf, leaves.pop(f"{path}_scale"), leaf.ndim - kept - 1)
        elif leaf.dtype == np.int8:
            scale, rank = leaves.pop(f"{path}_scale"), leaf.ndim
            lead = scale.ndim - kept
            shape = scale.shape[:lead] + (1,) * (rank - scale.ndim) + scale.shape[lead:]
            leaves[path] = leaf * scale.reshape(shape)
    return nested(leaves)


def float_twin(decoder: Decoder) -> Decoder:
    """A float decoder with the weights that a quantized one stands for."""
    config = with_weights(decoder.config, None)
    return decoder_structure(config).merge(stood_for(module_tree(decoder)))


def rms(x):
    return np.sqrt(np.mean(np.square(x, dtype=np.float64)))
