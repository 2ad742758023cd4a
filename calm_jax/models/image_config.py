"""The config of an image encoder, and how pixels become its inputs: without arrays."""

import dataclasses
from typing import Literal

from calm_jax.errors import CalmError
from calm_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class ImageEncoderConfig:
    """The architecture of one vision transformer (ViT, arXiv 2010.11929).

    Images and patches are measured in pixels, widths in features. Raises `CalmError` if fields
    contradict each other.

    >>> ImageEncoderConfig(image_size=(224, 224), patch_size=(16, 16), channels=3, embed_dim=768,
    ...                    num_layers=12, num_heads=12, mlp_dim=3072).item_shape
    (197, 768)
    """

    image_size: tuple[int, int]  # height and width
    patch_size: tuple[int, int]  # height and width, which divide those of the image
    channels: int  # 3: red, green and blue
    embed_dim: int  # features of the residual stream
    num_layers: int  # transformer layers
    num_heads: int  # heads, which divide embed_dim
    mlp_dim: int  # hidden features of the MLP
    activation: Literal["silu", "gelu_tanh", "gelu"] = "gelu"  # activation of the MLP
    norm_eps: float = 1e-12  # added to the variance
    attention_bias: bool = True  # on query, key and value
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of matmuls and the residual stream

    def __post_init__(self):
        for image, patch in zip(self.image_size, self.patch_size, strict=True):
            if image % patch:
                raise CalmError(
                    f"image_size {self.image_size} is not a multiple of patch_size "
                    f"{self.patch_size}"
                )
        if self.embed_dim % self.num_heads:
            raise CalmError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return (*self.image_size, self.channels)

    @property
    def item_shape(self) -> tuple[int, int]:
        """(P, F): the class token and the patches of an image, and the pixel values of a patch."""
        (height, width), (patch_height, patch_width) = self.image_size, self.patch_size
        patches = (height // patch_height) * (width // patch_width)
        return 1 + patches, patch_height * patch_width * self.channels

    @property
    def of_layers(self) -> DecoderConfig:
        """The config of the layers, which are those of a decoder without rotary positions."""
        return DecoderConfig(
            vocab_size=1,  # there are no tokens
            embed_dim=self.embed_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.embed_dim // self.num_heads,
            mlp_dim=self.mlp_dim,
            gated_mlp=False,
            activation=self.activation,
            norm="layer",
            norm_eps=self.norm_eps,
            norm_bias=True,
            attention_bias=self.attention_bias,
            output_bias=True,
            mlp_bias=True,
            rope=None,
            dtype=self.dtype,
        )


@dataclasses.dataclass(frozen=True)
class PixelScale:
    """How the pixels of an image, 0 to 255, become inputs: (pixel · factor - mean) / std.

    `mean` and `std` have a number for each channel.
    """

    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
