"""An image encoder, the vision transformer: an augment that reads images as items of patches.

Axes: B batch, S position in a row of items, N item of all rows, P position in an item, F pixel
values of a patch, E width; H height, W width and C channels of an image.
"""

from collections.abc import Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm_jax.errors import CalmError
from calm_jax.models.execution import Execution
from calm_jax.models.image_config import ImageEncoderConfig, PixelScale
from calm_jax.models.inputs import Inputs
from calm_jax.models.layer import ForwardPass, Layer
from calm_jax.models.layouts import residual_layout
from calm_jax.models.origin import Origin, of_origin
from calm_jax.models.parameters import constant, matrix, stacked
from calm_jax.models.products import affine
from calm_jax.models.stack import run_layers
from calm_jax.models.taps import Taps


class ImageEncoder(nnx.Module):
    """A vision transformer with random parameters; `calm_jax.load_encoder` returns a trained one.

    Its item is an image: P positions of F numbers, `item_shape`. Position 0 is the class token, for
    which an item has zeros that are not read; the others are patches, row by row, each with its
    pixel values in the order height, width, channel. All positions of an item see each other, and
    no other item.

    Attributes:
        layers: a `Layer` whose arrays have a leading axis of layers.
        pixel_scale: how pixels become inputs, or None if that is not known.
        source: the folder that the parameters were loaded from, or None.
        loaded_dtype: the dtype that `calm_jax.load_encoder` was asked for, or None.
        fingerprint: identifies the parameters as loaded; None if they were not loaded.
        execution: how the encoder is computed; may be set at any time.
    """

    source = of_origin("source")
    loaded_dtype = of_origin("loaded_dtype")
    fingerprint = of_origin("fingerprint")

    def __init__(
        self, config: ImageEncoderConfig, rngs: nnx.Rngs, pixel_scale: PixelScale | None = None
    ):
        P, F = config.item_shape
        self.config, self.pixel_scale = config, pixel_scale
        self.patches = matrix(rngs, (F, config.embed_dim), (None, "embed"), inputs=1)
        self.patches_bias = constant(0.0, (config.embed_dim,), ("embed",))
        self.class_token = constant(0.0, (config.embed_dim,), ("embed",))
        random_PE = jax.random.normal(rngs.params(), (P, config.embed_dim), jnp.float32)
        self.positions = nnx.Param(random_PE, axes=(None, "embed"))
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = stacked(lambda rngs: Layer(config.of_layers, rngs), keys)
        self.origin = Origin()
        self.execution = Execution()

    @property
    def width(self) -> int:
        """Features of the residual stream."""
        return self.config.embed_dim

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.config.num_layers

    @property
    def item_shape(self) -> tuple[int, int]:
        """(P, F): positions of an image, the class token's first, and pixel values of a patch."""
        return self.config.item_shape

    def item(self, image_HWC: np.ndarray) -> np.ndarray:
        """The item of an image: float32 [P, F].

        Args:
            image_HWC: uint8 [H, W, C], of the size that the encoder reads.

        Raises:
            CalmError: the image has another shape or dtype, or it is not known how its pixels
                become inputs.
        """
        scale, image_HWC = self.pixel_scale, np.asarray(image_HWC)
        if scale is None:
            raise CalmError(
                f"{self.source or 'the encoder'} does not say how pixels become inputs (it has no "
                "preprocessor_config.json); make items by item_of_pixel_values"
            )
        if image_HWC.dtype != np.uint8:
            raise CalmError(
                f"the image is {image_HWC.dtype}, but pixels must be uint8, 0 to 255; "
                "item_of_pixel_values takes numbers that are scaled already"
            )
        self._check(image_HWC.shape, self.config.image_shape, "height, width and channels")
        mean_C, std_C = (np.array(x, np.float32) for x in (scale.mean, scale.std))
        scaled_HWC = (image_HWC.astype(np.float32) * np.float32(scale.factor) - mean_C) / std_C
        return self.item_of_pixel_values(np.moveaxis(scaled_HWC, -1, 0))

    def item_of_pixel_values(self, x_CHW: np.ndarray) -> np.ndarray:
        """The item, float32 [P, F], of floats [C, H, W] as image processors of transformers give
        them (`pixel_values`).

        Raises `CalmError` if they have another shape.
        """
        height, width, channels = self.config.image_shape
        x_CHW = np.asarray(x_CHW, np.float32)
        self._check(x_CHW.shape, (channels, height, width), "channels, height and width")
        h, w = self.config.patch_size
        patches_PF = einops.rearrange(x_CHW, "C (Y h) (X w) -> (Y X) (h w C)", h=h, w=w)
        return np.concatenate([np.zeros_like(patches_PF[:1]), patches_PF])

    def taps(self, inputs: Inputs, layers: Sequence[int], cache: Any = None) -> tuple[Taps, Any]:
        """The residual stream [B, S, E] after each of `layers`, ascending, and `cache`.

        Later layers and the final norm do not run. No gradient flows back into the encoder.

        Args:
            inputs: `features_BTD` [B, S, F] holds the items of each row one after another.
        """
        B, S, F = inputs.features_BTD.shape
        x_NPE = self._embed(inputs.features_BTD.reshape(-1, self.item_shape[0], F))
        forward = ForwardPass(self.config.of_layers, self.execution, _bidirectional(x_NPE))
        found, first = {}, 0
        for layer in layers:
            x_NPE, _ = run_layers(self.layers, x_NPE, forward, first=first, count=layer + 1 - first)
            found[layer], first = x_NPE.reshape(B, S, self.width), layer + 1
        return Taps(jax.lax.stop_gradient(found)), cache

    def _embed(self, items_NPF: jax.Array) -> jax.Array:
        """What the first layer reads, [N, P, E] in the config's dtype."""
        dtype = self.config.dtype
        x_NPE = affine("NPF,FE->NPE", items_NPF.astype(dtype), self, "patches")
        x_NPE = x_NPE.at[:, 0].set(self.class_token[...].astype(dtype))
        return residual_layout(x_NPE + self.positions[...].astype(dtype))

    def _check(self, found: tuple[int, ...], needed: tuple[int, ...], axes: str) -> None:
        if found != needed:
            raise CalmError(
                f"the image has the shape {found}, but the encoder reads {needed}: {axes}; resize "
                "or convert it first"
            )


def _bidirectional(x_NPE: jax.Array) -> Inputs:
    """Inputs of items in which no position is later than another: all see each other."""
    same_NP = jnp.zeros(x_NPE.shape[:2], jnp.int32)
    return Inputs(features_BTD=x_NPE, order_BT=same_NP).filled()
