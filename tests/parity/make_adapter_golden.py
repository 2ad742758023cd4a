"""LoRA adapters that PEFT saves and the logits of their merged models, for the default tests.

    python tests/parity/make_adapter_golden.py

writes, where the extra [parity] is installed, tests/checkpoints/convert/golden/adapter_NAME for
each adapter of the models that make_golden.py wrote: adapter_config.json and
adapter_model.safetensors as PEFT saves them, and logits.npz with `tokens` int32 [B, T] and `logits`
float32 [B, T, V] after `merge_and_unload`.
"""

import json
import pathlib
import shutil
import sys
import warnings

import numpy as np
import peft
import torch
import transformers

# For a run from any folder.
ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.parity.random_huggingface import logits_of  # noqa: E402

GOLDEN = ROOT / "tests/checkpoints/convert/golden"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The base model, and what its adapter's config says.
ADAPTERS = {
    "llama": ("llama", {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "down_proj"]}),
    "qwen2": (
        "qwen2",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": ALL,
            "rank_pattern": {"up_proj": 2, r"model.layers.[01].self_attn.q_proj": 3},
            "alpha_pattern": {"v_proj": 3, "layers.2.mlp.down_proj": 1.5},
        },
    ),
    "mistral": ("mistral", {"r": 2, "lora_alpha": 4, "target_modules": [*ALL, "lm_head"]}),
    "qwen3": ("qwen3", {"r": 2, "lora_alpha": 4, "target_modules": r".*layers\.[02].*_proj"}),
    "gemma": ("gemma", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}),
    "gemma2": ("gemma2", {"r": 2, "target_modules": ALL, "layers_to_transform": [1]}),
    "gemma3": ("gemma3", {"r": 2, "target_modules": ["q_proj", "gate_proj"]}),
    "gemma3_seeing": ("gemma3_seeing", {"r": 2, "target_modules": ["q_proj", "gate_proj"]}),
    "gptj": ("gptj", {"r": 2, "target_modules": ["q_proj", "fc_in", "fc_out", "lm_head"]}),
    "falcon": (
        "falcon",
        {"r": 2, "fan_in_fan_out": True, "target_modules": ["query_key_value", "dense_h_to_4h"]},
    ),
    "cohere": ("cohere", {"r": 2, "lora_alpha": 3, "target_modules": ["k_proj", "o_proj"]}),
}
COMMITTED = ("llama", "qwen2")  # of the default tests; the others are made by the live ones


def save_adapter(name: str, folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Saves a random adapter; its matrices B would be zero as PEFT makes them.

    Returns tokens, int32 [B, T], and the merged model's logits, float32 [B, T, V].
    """
    base, fields = ADAPTERS[name]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN / base, dtype=torch.float32, attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what an adapter should not adapt, but may
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
        for key, x in model.named_parameters():
            if "lora_" in key:
                x.data = 0.4 * torch.randn(x.shape, generator=generator)
        model.save_pretrained(folder)
        merged = model.merge_and_unload()
    vocab_size = merged.config.get_text_config().vocab_size
    tokens = np.random.default_rng(1).integers(3, vocab_size, (1, 12), dtype=np.int32)
    return tokens, logits_of(merged, tokens)


if __name__ == "__main__":
    for name in COMMITTED:
        folder = GOLDEN / f"adapter_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        tokens, logits = save_adapter(name, folder)
        (folder / "README.md").unlink()  # PEFT's form of a model card
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        config["target_modules"] = sorted(config["target_modules"])  # PEFT holds a set
        config["base_model_name_or_path"] = name
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=logits)
        print(name, sum(file.stat().st_size for file in folder.iterdir()), "bytes")
