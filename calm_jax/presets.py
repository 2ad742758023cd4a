"""Sizes of published models, for plans made without their weights.

`preset:gemma2_9b` in a config's `anchor` or `augments` stands for a model of that size. The values
are those of the models' published config.json, in bfloat16 as they were released, under the names
of `calm_jax.DecoderConfig`'s fields. They are plain dictionaries, so that listing them in a help
text needs no JAX.
"""

import difflib
import math
import os
from typing import Any

from calm_jax.errors import CalmError

PREFIX = "preset:"


def _sizes(
    vocabulary: int,
    width: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int | None = None,
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "embed_dim": width,
        "mlp_dim": mlp,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim or width // heads,
        "dtype": "bfloat16",
    }


def _llama(*sizes: int, **fields: Any) -> dict[str, Any]:
    return {**_sizes(*sizes), "norm_eps": 1e-5, "tied_head": False, **fields}


def _llama3(*sizes: int, stretch: float | None = None, **fields: Any) -> dict[str, Any]:
    """`stretch` divides low rotary frequencies, from Llama 3.1 on."""
    scaling = None if stretch is None else {"kind": "llama3", "factor": stretch}
    return _llama(128_256, *sizes, rope_base=500_000.0, rope_scaling=scaling, **fields)


def _qwen2(*sizes: int, **fields: Any) -> dict[str, Any]:
    fields = {"attention_bias": True, "tied_head": False, **fields}
    return {**_sizes(*sizes), "rope_base": 1e6, **fields}


def _qwen3(*sizes: int, **fields: Any) -> dict[str, Any]:
    fields = {"qk_norm": "rms", "tied_head": False, **fields}
    return {**_sizes(151_936, *sizes, 128), "rope_base": 1e6, **fields}


def _gemma(*sizes: int, **fields: Any) -> dict[str, Any]:
    values = _sizes(*sizes)
    own = {"norm_offset": 1.0, "activation": "gelu_tanh"}
    return {**values, **own, "embed_scale": math.sqrt(values["embed_dim"]), **fields}


def _gemma2(*sizes: int, scaled_by: int) -> dict[str, Any]:
    """Queries are divided by the square root of `scaled_by` features."""
    return _gemma(
        256_000,
        *sizes,
        query_scale=scaled_by**-0.5,
        post_norms=True,
        window=4096,
        window_pattern=(True, False),
        attention_logit_cap=50.0,
        final_logit_cap=30.0,
    )


def _gemma3(
    *sizes: int, window: int, scaled_by: int = 256, stretch: float | None = None
) -> dict[str, Any]:
    """The text part. `stretch` divides the rotary frequencies of the global layers."""
    return _gemma(
        *sizes,
        query_scale=scaled_by**-0.5,
        qk_norm="rms",
        post_norms=True,
        window=window,
        window_pattern=(True,) * 5 + (False,),
        rope_base=1e6,
        local_rope_base=1e4,
        rope_scaling=None if stretch is None else {"kind": "linear", "factor": stretch},
    )


def _palm(layers: int, width: int, heads: int) -> dict[str, Any]:
    """PaLM (arXiv 2204.02311, Table 1); its vocabulary includes the padding used in training."""
    return {
        **_sizes(256_128, width, 4 * width, layers, heads, 1, 256),
        "block": "parallel",
        "norm_offset": 1.0,
        "logit_scale": width**-0.5,
    }


# Vocabulary if it differs within a family, width, MLP width, layers, heads, key and value heads,
# width of a head if it is not width / heads.
PRESETS = {
    "llama2_7b": _llama(32_000, 4096, 11_008, 32, 32, 32),
    "llama2_13b": _llama(32_000, 5120, 13_824, 40, 40, 40),
    "llama2_70b": _llama(32_000, 8192, 28_672, 80, 64, 8),
    "llama3_8b": _llama3(4096, 14_336, 32, 32, 8),
    "llama3_70b": _llama3(8192, 28_672, 80, 64, 8),
    "llama3.1_8b": _llama3(4096, 14_336, 32, 32, 8, stretch=8.0),
    "llama3.1_70b": _llama3(8192, 28_672, 80, 64, 8, stretch=8.0),
    "llama3.1_405b": _llama3(16_384, 53_248, 126, 128, 8, stretch=8.0),
    "llama3.2_1b": _llama3(2048, 8192, 16, 32, 8, stretch=32.0, tied_head=True),
    "llama3.2_3b": _llama3(3072, 8192, 28, 24, 8, stretch=32.0, tied_head=True),
    "mistral_7b_v0.1": _llama(32_000, 4096, 14_336, 32, 32, 8, window=4096),
    "mistral_7b_v0.3": _llama(32_768, 4096, 14_336, 32, 32, 8, rope_base=1e6),
    "mistral_nemo_12b": _llama(131_072, 5120, 14_336, 40, 32, 8, 128, rope_base=1e6),
    "mistral_small_24b": _llama(131_072, 5120, 32_768, 40, 32, 8, 128, rope_base=1e8),
    "qwen2.5_0.5b": _qwen2(151_936, 896, 4864, 24, 14, 2, tied_head=True),
    "qwen2.5_1.5b": _qwen2(151_936, 1536, 8960, 28, 12, 2, tied_head=True),
    "qwen2.5_3b": _qwen2(151_936, 2048, 11_008, 36, 16, 2, tied_head=True),
    "qwen2.5_7b": _qwen2(152_064, 3584, 18_944, 28, 28, 4),
    "qwen2.5_14b": _qwen2(152_064, 5120, 13_824, 48, 40, 8),
    "qwen2.5_32b": _qwen2(152_064, 5120, 27_648, 64, 40, 8),
    "qwen2.5_72b": _qwen2(152_064, 8192, 29_568, 80, 64, 8),
    "qwen3_0.6b": _qwen3(1024, 3072, 28, 16, 8, tied_head=True),
    "qwen3_1.7b": _qwen3(2048, 6144, 28, 16, 8, tied_head=True),
    "qwen3_4b": _qwen3(2560, 9728, 36, 32, 8, tied_head=True),
    "qwen3_8b": _qwen3(4096, 12_288, 36, 32, 8),
    "qwen3_14b": _qwen3(5120, 17_408, 40, 40, 8),
    "qwen3_32b": _qwen3(5120, 25_600, 64, 64, 8),
    "gemma_2b": _gemma(256_000, 2048, 16_384, 18, 8, 1, 256),
    "gemma_7b": _gemma(256_000, 3072, 24_576, 28, 16, 16, 256),
    "gemma2_2b": _gemma2(2304, 9216, 26, 8, 4, 256, scaled_by=256),
    "gemma2_9b": _gemma2(3584, 14_336, 42, 16, 8, 256, scaled_by=256),
    "gemma2_27b": _gemma2(4608, 36_864, 46, 32, 16, 128, scaled_by=144),
    "gemma3_270m": _gemma3(262_144, 640, 2048, 18, 4, 1, 256, window=512),
    "gemma3_1b": _gemma3(262_144, 1152, 6912, 26, 4, 1, 256, window=512),
    "gemma3_4b": _gemma3(262_208, 2560, 10_240, 34, 8, 4, 256, window=1024, stretch=8.0),
    "gemma3_12b": _gemma3(262_208, 3840, 15_360, 48, 16, 8, 256, window=1024, stretch=8.0),
    "gemma3_27b": _gemma3(
        262_208, 5376, 21_504, 62, 32, 16, 128, window=1024, scaled_by=168, stretch=8.0
    ),
    "palm_8b": _palm(32, 4096, 16),
    "palm_62b": _palm(64, 8192, 32),
    "palm_540b": _palm(118, 18_432, 48),
}


def is_preset(path: os.PathLike | str) -> bool:
    """Whether a model is named as a preset, rather than by the path of its folder."""
    return os.fspath(path).startswith(PREFIX)


def fields(preset: str) -> dict[str, Any]:
    """The `DecoderConfig` fields of "preset:NAME". Raises `CalmError` for an unknown name."""
    name = preset.removeprefix(PREFIX)
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0)
        raise CalmError(f"{preset!r} is not a known preset; did you mean '{PREFIX}{near[0]}'?")
    return PRESETS[name]
