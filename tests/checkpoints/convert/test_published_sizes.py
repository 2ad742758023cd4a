"""Published models by their config.json: how many parameters each has, and every shape.

The numbers are those of the published files, an own formula's where it says so; no weight is made.
"""

import math

import numpy as np
import pytest
from flax import nnx

from calm_jax import Decoder
from calm_jax.checkpoints.convert.gemma import Gemma2, Gemma3
from calm_jax.checkpoints.convert.llama import Llama, Mistral, Qwen2, Qwen3
from calm_jax.checkpoints.convert.table import sizes
from calm_jax.models.parameters import Structure


def keys(vocab, width, mlp, layers, heads, kv_heads, **others):
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **others,
    }


LLAMA_3 = {
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
QWEN = {"rope_theta": 1e6, "use_sliding_window": False, "max_window_layers": 28}
# Family, config.json, number of parameters.
PUBLISHED = {
    "Llama 2 7B": (Llama(), keys(32_000, 4096, 11_008, 32, 32, 32), 6_738_415_616),
    "Llama 2 70B": (Llama(), keys(32_000, 8192, 28_672, 80, 64, 8), 68_976_648_192),
    "Llama 3.1 8B": (
        Llama(),
        keys(128_256, 4096, 14_336, 32, 32, 8, **LLAMA_3),
        8_030_261_248,
    ),
    "Llama 3.1 70B": (
        Llama(),
        keys(128_256, 8192, 28_672, 80, 64, 8, **LLAMA_3),
        70_553_706_496,
    ),
    "Llama 3.2 1B": (
        Llama(),
        keys(128_256, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True, **LLAMA_3),
        1_235_814_400,
    ),
    "Mistral 7B v0.1": (
        Mistral(),
        keys(32_000, 4096, 14_336, 32, 32, 8, sliding_window=4096),
        7_241_732_096,
    ),
    "Qwen2.5 7B": (
        Qwen2(),
        keys(152_064, 3584, 18_944, 28, 28, 4, sliding_window=131_072, **QWEN),
        7_615_616_512,
    ),
    "Qwen2.5 72B": (
        Qwen2(),
        keys(152_064, 8192, 29_568, 80, 64, 8, sliding_window=131_072, **QWEN),
        72_706_203_648,
    ),
    "Qwen3 8B": (
        Qwen3(),
        keys(151_936, 4096, 12_288, 36, 32, 8, head_dim=128, sliding_window=None, **QWEN),
        8_190_735_360,
    ),
    "Qwen3 32B": (
        Qwen3(),
        keys(151_936, 5120, 25_600, 64, 64, 8, head_dim=128, sliding_window=None, **QWEN),
        32_762_123_264,
    ),
    "Gemma 2 27B": (
        Gemma2(),
        keys(256_000, 4608, 36_864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144),
        27_227_128_320,
    ),
    "Gemma 3 27B, text": (
        Gemma3(),
        keys(
            262_208,
            5376,
            21_504,
            62,
            32,
            16,
            head_dim=128,
            query_pre_attn_scalar=168,
            sliding_window=1024,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
        # By hand: embedding, final norm, and a layer's attention, MLP, four norms and two on heads.
        262_208 * 5376
        + 5376
        + 62 * (2 * 5376 * 128 * (32 + 16) + 3 * 5376 * 21_504 + 4 * 5376 + 2 * 128),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_shapes(name):
    family, values, published = PUBLISHED[name]
    config = family.decoder_config(values, name)
    arrays = abstract_arrays(config)
    assert sum(math.prod(shape) for shape in arrays.values()) == published
    axes = sizes(config)
    found = {}
    in_source = 0
    for line in family.rules(config):
        for source in line.names(config.num_layers):
            in_source += math.prod(line.source_shape(axes))
            # A view of one number stands for a weight of any size.
            tensor = np.broadcast_to(np.float32(0), line.source_shape(axes))
            for target, array in line.split(tensor, axes):
                shape = (config.num_layers, *array.shape) if line.per_layer else array.shape
                assert found.setdefault(target, shape) == shape, source
    assert found == arrays
    assert in_source == published


def abstract_arrays(config):
    """Shapes of a decoder's arrays by their canonical paths."""
    structure = Structure(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    return flat(structure.abstract())


def flat(tree, path=()):
    if hasattr(tree, "shape"):
        return {"/".join(path).replace("layers/pieces/0/", "layers/"): tree.shape}
    return {k: v for key, x in tree.items() for k, v in flat(x, (*path, str(key))).items()}
