"""Tiny random image encoders of transformers and their states, for the tests that run without it.

    python tests/parity/make_vit_golden.py

writes, where the extra [parity] is installed, a folder tests/checkpoints/convert/golden/NAME for
each model: config.json and model.safetensors as transformers saves them (weights in bfloat16),
preprocessor_config.json, and states.npz with `images`, uint8 [N, H, W, C], what the image processor
makes of them, `pixel_values`, float32 [N, C, H, W], and `states`, float32 [L, N, P, D], after each
layer.
"""

import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

# For a run from any folder.
ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.parity.random_huggingface import encoder_states, save_random_encoder  # noqa: E402

GOLDEN = ROOT / "tests/checkpoints/convert/golden"
MOST_BYTES = 70_000
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
MODELS = {
    "vit": (
        "ViTForImageClassification",
        {"image_size": 12, "patch_size": 4, "num_labels": 3},
        {"size": {"height": 12, "width": 12}},
    ),
    "vit_oblong": (
        "ViTModel",
        {
            "image_size": [6, 8],
            "patch_size": [3, 2],
            "qkv_bias": False,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-3,
        },
        {"size": {"height": 6, "width": 8}, "image_mean": MEAN, "image_std": STD},
    ),
}


def write(name: str) -> None:
    """Writes one model's folder anew."""
    kind, fields, scale = MODELS[name]
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    model = getattr(transformers, kind)(transformers.ViTConfig(**SIZES | fields))
    processor = ViTImageProcessorPil(**scale)
    with tempfile.TemporaryDirectory() as saved:
        save_random_encoder(model, pathlib.Path(saved), dtype=torch.bfloat16)
        processor.save_pretrained(saved)
        for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
            (folder / file).write_bytes((pathlib.Path(saved) / file).read_bytes())
    sizes = scale["size"]
    shape = (2, sizes["height"], sizes["width"], 3)
    images = np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)
    pixel_values = processor(list(images), return_tensors="np").pixel_values
    states = encoder_states(model.float(), pixel_values)
    np.savez_compressed(
        folder / "states.npz", images=images, pixel_values=pixel_values, states=states
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size} bytes")
    if size > MOST_BYTES:
        raise SystemExit(f"{name}: {size} bytes; at most {MOST_BYTES}")


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        write(name)
