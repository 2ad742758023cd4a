"""ViT, the vision transformer, as transformers publishes it: an image encoder.

It is not a decoder, so it has no frozen folder; `calm_jax.load_encoder` reads it as it is.
"""

import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from calm_jax.checkpoints.convert import huggingface_config as read
from calm_jax.checkpoints.convert.table import Rule, Unused, rule
from calm_jax.checkpoints.sources.source import Source, Tensor
from calm_jax.errors import CalmError
from calm_jax.models.image_config import ImageEncoderConfig, PixelScale

MODEL_TYPE = "vit"
# The values of absent keys of config.json (transformers' ViTConfig).
_DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
# Tensors below "encoder.layer.{layer}".
_LAYER = {
    "layernorm_before.weight": ("layers/attention_norm/scale", "D -> D"),
    "layernorm_before.bias": ("layers/attention_norm/bias", "D -> D"),
    "attention.attention.query.weight": ("layers/attention/query", "(N H) D -> D N H"),
    "attention.attention.key.weight": ("layers/attention/key", "(N H) D -> D N H"),
    "attention.attention.value.weight": ("layers/attention/value", "(N H) D -> D N H"),
    "attention.output.dense.weight": ("layers/attention/output", "D (N H) -> N H D"),
    "attention.output.dense.bias": ("layers/attention/output_bias", "D -> D"),
    "layernorm_after.weight": ("layers/mlp_norm/scale", "D -> D"),
    "layernorm_after.bias": ("layers/mlp_norm/bias", "D -> D"),
    "intermediate.dense.weight": ("layers/mlp/up", "F D -> D F"),
    "intermediate.dense.bias": ("layers/mlp/up_bias", "F -> F"),
    "output.dense.weight": ("layers/mlp/down", "D F -> F D"),
    "output.dense.bias": ("layers/mlp/down_bias", "D -> D"),
}
_ATTENTION_BIASES = {
    "attention.attention.query.bias": ("layers/attention/query_bias", "(N H) -> N H"),
    "attention.attention.key.bias": ("layers/attention/key_bias", "(N H) -> N H"),
    "attention.attention.value.bias": ("layers/attention/value_bias", "(N H) -> N H"),
}
# What comes after the last layer, and what stands for hidden patches: taps need none of it.
UNUSED = (
    Unused(r"(layernorm|pooler\.dense|classifier|decoder\.0)\.(weight|bias)"),
    Unused(r"embeddings\.mask_token"),
)
# Steps of an image processor that are the same for every image of the right size and colours.
_STEPS = {"do_rescale", "do_normalize", "do_resize", "do_center_crop", "do_convert_rgb"}
# The values of absent keys of preprocessor_config.json (transformers' ViTImageProcessor).
_FACTOR, _MEAN_AND_STD = 1 / 255, 0.5


def encoder_config(values: Mapping[str, Any], where: str) -> ImageEncoderConfig:
    """The encoder's config from config.json; `where` names the file.

    Raises `CalmError` for another family, and for what is not supported, by its key and value.
    """
    if values.get("model_type") != MODEL_TYPE:
        found = reprlib.repr(values.get("model_type"))
        raise CalmError(f"{where}: model_type is {found}; only {MODEL_TYPE!r} is supported")
    read.refuse(values, where, "quantization_config", None)
    values = {**_DEFAULTS, **values}
    head_dim = read.quotient(values, "hidden_size", "num_attention_heads", where)
    read.refuse(values, where, "head_dim", None, head_dim)
    try:
        return ImageEncoderConfig(
            image_size=_height_and_width(values, "image_size", where),
            patch_size=_height_and_width(values, "patch_size", where),
            channels=read.whole_number(values, "num_channels", where),
            embed_dim=read.whole_number(values, "hidden_size", where),
            num_layers=read.whole_number(values, "num_hidden_layers", where),
            num_heads=read.whole_number(values, "num_attention_heads", where),
            mlp_dim=read.whole_number(values, "intermediate_size", where),
            activation=read.activation(values, "hidden_act", where, "gelu"),
            norm_eps=read.number(values, "layer_norm_eps", where, 1e-12),
            attention_bias=read.boolean(values, "qkv_bias", where, True),
        )
    except CalmError as error:  # also from fields that contradict each other
        raise CalmError(str(error) if where in str(error) else f"{where}: {error}") from None


def pixel_scale(values: Mapping[str, Any], channels: int, where: str) -> PixelScale:
    """How pixels become inputs, from preprocessor_config.json; `where` names the file.

    Raises `CalmError` for a value that cannot be used, or a step that is not supported.
    """
    for key, value in values.items():
        if key.startswith("do_") and key not in _STEPS and value:
            read.refuse(values, where, key)
    factor, mean, std = 1.0, [0.0] * channels, [1.0] * channels
    if read.boolean(values, "do_rescale", where, True):
        factor = read.number(values, "rescale_factor", where, _FACTOR)
    if read.boolean(values, "do_normalize", where, True):
        mean = _of_channels(values, "image_mean", channels, where, -read.LARGEST)
        std = _of_channels(values, "image_std", channels, where, sys.float_info.min)
    return PixelScale(factor, tuple(mean), tuple(std))


def rules(config: ImageEncoderConfig) -> tuple[Rule, ...]:
    """The table for an encoder with this config."""
    of_a_layer = _LAYER | (_ATTENTION_BIASES if config.attention_bias else {})
    projection = "embeddings.patch_embeddings.projection"
    return (
        rule(f"{projection}.weight", "patches", "D C h w -> (h w C) D"),
        rule(f"{projection}.bias", "patches_bias", "D -> D"),
        rule("embeddings.cls_token", "class_token", "1 1 D -> D"),
        rule("embeddings.position_embeddings", "positions", "1 P D -> P D"),
        *(rule(f"encoder.layer.{{layer}}.{name}", *ours) for name, ours in of_a_layer.items()),
    )


def tensors(source: Source) -> Mapping[str, Tensor]:
    """The source's tensors by the names of `rules`: those of a model with a head start with vit."""
    found = {name.removeprefix("vit."): tensor for name, tensor in source.tensors.items()}
    if len(found) < len(source.tensors):
        raise CalmError(f"{source.path} has some tensors twice, with and without vit.")
    return found


def _height_and_width(values: Mapping[str, Any], key: str, where: str) -> tuple[int, int]:
    """One whole number for both, or a list of two."""
    value = values[key]
    sides = value if isinstance(value, list) and len(value) == 2 else [value, value]
    height, width = (read.whole_number({key: side}, key, where) for side in sides)
    return height, width


def _of_channels(
    values: Mapping[str, Any], key: str, channels: int, where: str, least: float
) -> list[float]:
    """A finite number of at least `least` for each channel, or a single one for all."""
    value = values.get(key, _MEAN_AND_STD)
    found = value if isinstance(value, list) else [value] * channels
    are_numbers = all(isinstance(x, int | float) and least <= x <= read.LARGEST for x in found)
    if len(found) != channels or not are_numbers:
        what = "a finite number" + " above 0" * (least > 0)
        raise CalmError(
            f"{where}: {key} is {reprlib.repr(value)}; it must have {what} for each of {channels} "
            "channels"
        )
    return list(map(float, found))
