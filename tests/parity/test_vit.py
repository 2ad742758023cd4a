"""ViT against transformers itself: the states after every layer of random models."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch", reason="needs the extra [parity]")
transformers = pytest.importorskip("transformers", reason="needs the extra [parity]")

import calm_jax  # noqa: E402
from calm_jax.checkpoints.convert import vit  # noqa: E402
from tests.image_encoders import difference, states_of  # noqa: E402
from tests.parity.random_huggingface import encoder_states, save_random_encoder  # noqa: E402

TOLERANCE = 1e-5  # of the largest state of a layer
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
# What a config has besides SIZES, the class of the model, and how it is saved.
MODELS = {
    "plain": ({}, "ViTModel", {}),
    "no bias on heads": ({"qkv_bias": False}, "ViTModel", {}),
    "gelu_new": ({"hidden_act": "gelu_new"}, "ViTModel", {}),
    "gelu_pytorch_tanh": ({"hidden_act": "gelu_pytorch_tanh"}, "ViTModel", {}),
    "silu": ({"hidden_act": "silu"}, "ViTModel", {}),
    "large eps": ({"layer_norm_eps": 0.05}, "ViTModel", {}),
    "large patches": ({"image_size": 24, "patch_size": 12}, "ViTModel", {}),
    "one patch": ({"image_size": 8, "patch_size": 8, "num_hidden_layers": 1}, "ViTModel", {}),
    "oblong": ({"image_size": [12, 16], "patch_size": [2, 8]}, "ViTModel", {}),
    "grey": ({"num_channels": 1}, "ViTModel", {}),
    "one head": ({"num_attention_heads": 1, "num_hidden_layers": 2}, "ViTModel", {}),
    "classifier": ({"num_labels": 5}, "ViTForImageClassification", {}),
    "hidden patches": ({"encoder_stride": 4}, "ViTForMaskedImageModeling", {}),
    "sharded": ({}, "ViTForImageClassification", {"max_shard_size": "40KB"}),
    "rounded": ({}, "ViTModel", {"dtype": torch.bfloat16}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, pixel values [N, C, H, W], transformers' states [L, N, P, D]) of a model."""
    found = {}

    def get(name):
        if name not in found:
            fields, kind, save_options = MODELS[name]
            folder = tmp_path_factory.mktemp("vit")
            model = getattr(transformers, kind)(transformers.ViTConfig(**SIZES | fields))
            found[name] = (folder, *save_random_encoder(model, folder, **save_options))
        return found[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_states_after_every_layer(name, saved):
    folder, x_NCHW, states = saved(name)
    encoder = calm_jax.load_encoder(folder, dtype="float32")
    assert len(states) == encoder.depth
    assert difference(states_of(encoder, x_NCHW), states) <= TOLERANCE
    if name == "sharded":
        assert len(list(folder.glob("*.safetensors"))) > 1


def test_absent_keys_mean_what_they_mean_to_transformers():
    """Checked on the config that transformers writes out for an empty one."""
    whole = json.loads(transformers.ViTConfig().to_json_string(use_diff=False))
    assert vit.encoder_config({"model_type": "vit"}, "") == vit.encoder_config(whole, "")


def test_transformers_reads_the_folder_as_we_do(saved):
    folder, x_NCHW, states = saved("classifier")
    theirs = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)
    np.testing.assert_allclose(encoder_states(theirs, x_NCHW), states, atol=1e-5)


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS = {
    "default": {},
    "ImageNet's": IMAGENET,
    "no rescaling": {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
    "no mean": {"do_normalize": False},
    "another factor": {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 0.9, 1.1]},
    "resizing": {"do_resize": True, "size": {"height": 16, "width": 16}},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_items_are_those_of_the_image_processor(name, saved, tmp_path):
    pytest.importorskip("PIL")
    link_with(saved("plain")[0], tmp_path)
    kind = transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil
    processor = kind(**{"do_resize": False, **PROCESSORS[name]})
    processor.save_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(256, size=(16, 16, 3)).astype(np.uint8)
    encoder = calm_jax.load_encoder(tmp_path)
    (theirs,) = processor(image, return_tensors="np").pixel_values
    assert difference([encoder.item(image)], [encoder.item_of_pixel_values(theirs)]) <= 1e-6


def link_with(folder, other, **changes):
    """The same weights with a config.json in which some keys have other values."""
    for file in folder.glob("*.safetensors*"):
        (other / file.name).symlink_to(file)
    values = json.loads((folder / "config.json").read_text()) | changes
    (other / "config.json").write_text(json.dumps(values))


KEYS = {
    "forms of gelu": ("plain", {"hidden_act": "gelu_new"}),
    "the other form of gelu": ("gelu_new", {"hidden_act": "gelu"}),
    "norm eps": ("large eps", {"layer_norm_eps": 1e-12}),
    "number of heads": ("plain", {"num_attention_heads": 8}),
}


@pytest.mark.parametrize("name", KEYS)
def test_every_key_is_seen_in_the_states(name, saved, tmp_path):
    model, changes = KEYS[name]
    folder, x_NCHW, states = saved(model)
    link_with(folder, tmp_path, **changes)
    assert difference(states_of(calm_jax.load_encoder(tmp_path), x_NCHW), states) > 5 * TOLERANCE


def exchanged(first, second):
    def other(name):
        return name.replace(*((first, second) if first in name else (second, first)))

    return lambda tensors: {name: tensors[other(name)] for name in tensors}


def turned(tensors):
    return {k: x.swapaxes(-1, -2).copy() if x.ndim == 4 else x for k, x in tensors.items()}


def zeroed(ending):
    return lambda tensors: {k: 0 * x if k.endswith(ending) else x for k, x in tensors.items()}


TRAPS = {
    "norms": exchanged("layernorm_before", "layernorm_after"),
    "query and key": exchanged("attention.query", "attention.key"),
    "key and value": exchanged("attention.key", "attention.value"),
    "query bias": zeroed("attention.query.bias"),
    "value bias": zeroed("attention.value.bias"),
    "output bias": zeroed("attention.output.dense.bias"),
    "bias of the first matrix": zeroed("intermediate.dense.bias"),
    "bias of the second matrix": zeroed(".output.dense.bias"),
    "bias of the norm": zeroed("layernorm_before.bias"),
    "bias of patches": zeroed("projection.bias"),
    "class token": zeroed("cls_token"),
    "positions": zeroed("position_embeddings"),
    "turned patches": turned,
}


@pytest.mark.parametrize("trap", TRAPS)
def test_every_tensor_is_seen_in_the_states(trap, saved, tmp_path):
    folder, x_NCHW, states = saved("plain")
    tensors = TRAPS[trap](load_file(folder / "model.safetensors"))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert difference(states_of(calm_jax.load_encoder(tmp_path), x_NCHW), states) > 5 * TOLERANCE
