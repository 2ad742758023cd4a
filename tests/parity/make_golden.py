"""Tiny random models of transformers and their logits, for the tests that run without it.

    python tests/parity/make_golden.py [FAMILY …]

writes, where the extra [parity] is installed, a folder tests/checkpoints/convert/golden/FAMILY for
each model: config.json and model.safetensors as transformers saves them (weights in bfloat16, which
halves them), and logits.npz with `tokens` int32 [B, T] and `logits` float32 [B, T, V].
"""

import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers

# For a run from any folder.
ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.parity.random_huggingface import save_random  # noqa: E402

GOLDEN = ROOT / "tests/checkpoints/convert/golden"
MOST_BYTES = 70_000
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LOCAL_5 = {"sliding_window": 5, "query_pre_attn_scalar": 12}
GEMMA_3 = {
    **SIZES,
    **LOCAL_5,
    "num_hidden_layers": 7,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
PARALLEL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
EYE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3_seeing() -> transformers.PreTrainedConfig:
    """A model that also sees, of which the language model alone is converted."""
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**GEMMA_3 | {"num_hidden_layers": 2}),
        vision_config=transformers.SiglipVisionConfig(**EYE),
        mm_tokens_per_image=4,
        boi_token_index=1,
        eoi_token_index=2,
        image_token_index=0,
    )


MODELS = {
    "llama": lambda: transformers.LlamaConfig(
        **SIZES, rope_parameters=LLAMA_3, attention_bias=True, mlp_bias=True
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, **LOCAL_5, attn_logit_softcapping=5.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA_3),
    "gemma3_seeing": gemma3_seeing,
    "gptj": lambda: transformers.GPTJConfig(
        vocab_size=64, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_inner=40
    ),
    "falcon": lambda: transformers.FalconConfig(**PARALLEL, ffn_hidden_size=40),
    "cohere": lambda: transformers.CohereConfig(
        **PARALLEL, intermediate_size=40, num_key_value_heads=2
    ),
}


def write(name: str) -> None:
    """Writes one model's folder anew."""
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as saved:
        tokens, logits = save_random(
            MODELS[name](), saved, length=12, batch=1, dtype=torch.bfloat16
        )
        for file in ("config.json", "model.safetensors"):
            (folder / file).write_bytes((pathlib.Path(saved) / file).read_bytes())
    np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=logits)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size} bytes")
    if size > MOST_BYTES:
        raise SystemExit(f"{name}: {size} bytes; at most {MOST_BYTES}")


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        write(name)
