"""Presets: parameters as published, values as in config.json, and every shape as converted.

No weight is made.
"""

import math

import numpy as np
import pytest
from flax import nnx

from calm_jax import Decoder, DecoderConfig, presets
from calm_jax.checkpoints.convert.gemma import Gemma, Gemma2, Gemma3
from calm_jax.checkpoints.convert.huggingface_config import SIZES
from calm_jax.checkpoints.convert.llama import Llama, Mistral, Qwen2, Qwen3
from calm_jax.checkpoints.convert.table import sizes
from calm_jax.models.parameters import Structure

LLAMA = {"rms_norm_eps": 1e-5}
LLAMA_3 = {**LLAMA, "rope_theta": 500_000.0}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_31 = {**LLAMA_3, "rope_scaling": {**LLAMA_3_ROPE, "factor": 8.0}}
LLAMA_32 = {
    **LLAMA_3,
    "rope_scaling": {**LLAMA_3_ROPE, "factor": 32.0},
    "tie_word_embeddings": True,
}
QWEN = {"rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 131_072}
TIED_QWEN = {**QWEN, "tie_word_embeddings": True}
GEMMA_2 = {"query_pre_attn_scalar": 256, "sliding_window": 4096}
# What transformers' Gemma3TextConfig says of rotary bases where config.json does not.
GEMMA_3 = {
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
GEMMA_3_LONG = {
    **GEMMA_3,
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
# Number of parameters, family, and what config.json says beside the sizes.
PUBLISHED = {
    "llama2_7b": (6_738_415_616, Llama(), LLAMA),
    "llama2_13b": (13_015_864_320, Llama(), LLAMA),
    "llama2_70b": (68_976_648_192, Llama(), LLAMA),
    "llama3_8b": (8_030_261_248, Llama(), LLAMA_3),
    "llama3_70b": (70_553_706_496, Llama(), LLAMA_3),
    "llama3.1_8b": (8_030_261_248, Llama(), LLAMA_31),
    "llama3.1_70b": (70_553_706_496, Llama(), LLAMA_31),
    "llama3.1_405b": (405_853_388_800, Llama(), LLAMA_31),
    "llama3.2_1b": (1_235_814_400, Llama(), LLAMA_32),
    "llama3.2_3b": (3_212_749_824, Llama(), LLAMA_32),
    "mistral_7b_v0.1": (7_241_732_096, Mistral(), {**LLAMA, "sliding_window": 4096}),
    "mistral_7b_v0.3": (
        7_248_023_552, Mistral(), {**LLAMA, "sliding_window": None, "rope_theta": 1e6},
    ),
    "mistral_nemo_12b": (
        12_247_782_400, Mistral(), {**LLAMA, "sliding_window": None, "rope_theta": 1e6},
    ),
    "mistral_small_24b": (
        23_572_403_200, Mistral(), {**LLAMA, "sliding_window": None, "rope_theta": 1e8},
    ),
    "qwen2.5_0.5b": (494_032_768, Qwen2(), TIED_QWEN),
    "qwen2.5_1.5b": (1_543_714_304, Qwen2(), TIED_QWEN),
    "qwen2.5_3b": (3_085_938_688, Qwen2(), TIED_QWEN),
    "qwen2.5_7b": (7_615_616_512, Qwen2(), QWEN),
    "qwen2.5_14b": (14_770_033_664, Qwen2(), QWEN),
    "qwen2.5_32b": (32_763_876_352, Qwen2(), QWEN),
    "qwen2.5_72b": (72_706_203_648, Qwen2(), QWEN),
    # Files of the tied ones hold the head as well, so more numbers than these.
    "qwen3_0.6b": (596_049_920, Qwen3(), TIED_QWEN),
    "qwen3_1.7b": (1_720_574_976, Qwen3(), TIED_QWEN),
    "qwen3_4b": (4_022_468_096, Qwen3(), TIED_QWEN),
    "qwen3_8b": (8_190_735_360, Qwen3(), QWEN),
    "qwen3_14b": (14_768_307_200, Qwen3(), QWEN),
    "qwen3_32b": (32_762_123_264, Qwen3(), QWEN),
    "gemma_2b": (2_506_172_416, Gemma(), {}),
    "gemma_7b": (8_537_680_896, Gemma(), {}),
    "gemma2_2b": (2_614_341_888, Gemma2(), GEMMA_2),
    "gemma2_9b": (9_241_705_984, Gemma2(), GEMMA_2),
    "gemma2_27b": (27_227_128_320, Gemma2(), {**GEMMA_2, "query_pre_attn_scalar": 144}),
    "gemma3_270m": (268_098_176, Gemma3(), GEMMA_3),
    "gemma3_1b": (999_885_952, Gemma3(), GEMMA_3),
    # Published with their eyes: one vision tower, and a projection with its norm.
    "gemma3_4b": (4_300_079_472 - 416_866_032 - 1152 * 2561, Gemma3(), GEMMA_3_LONG),
    "gemma3_12b": (12_187_325_040 - 416_866_032 - 1152 * 3841, Gemma3(), GEMMA_3_LONG),
    "gemma3_27b": (
        27_432_406_640 - 416_866_032 - 1152 * 5377,
        Gemma3(),
        {**GEMMA_3_LONG, "query_pre_attn_scalar": 168},
    ),
}  # fmt: skip
# Those of the paper, and the scale of a last norm, which PaLM's has not.
PALM = {
    "palm_8b": 8_632_532_992 + 4096,
    "palm_62b": 62_496_702_464 + 8192,
    "palm_540b": 540_358_815_744 + 18_432,
}


def config_of(name: str) -> DecoderConfig:
    return DecoderConfig.from_dict(presets.fields(f"preset:{name}"))


def test_every_preset_is_checked():
    assert presets.PRESETS.keys() == PUBLISHED.keys() | PALM.keys()


@pytest.mark.parametrize("name", PALM)
def test_parameters_of_palm(name):
    arrays = abstract_arrays(config_of(name))
    assert sum(math.prod(shape) for shape in arrays.values()) == PALM[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_values_and_shapes(name):
    published, family, values = PUBLISHED[name]
    config = config_of(name)
    values = {key: getattr(config, field) for key, field in SIZES.items()} | values
    read = family.decoder_config(values, name)
    assert read.to_dict() | {"dtype": "bfloat16"} == config.to_dict()
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
        return {"/".join(path).replace("layers/", "layers/"): tree.shape}
    return {k: v for key, x in tree.items() for k, v in flat(x, (*path, str(key))).items()}
