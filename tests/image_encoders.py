"""What tests ask of image encoders."""

import jax.numpy as jnp
import numpy as np

from calm_jax.models import Inputs


def states_of(encoder, x_NCHW) -> np.ndarray:
    """The states after every layer, float32 [L, N, P, E], of pixel values [N, C, H, W]."""
    items_NPF = np.stack([encoder.item_of_pixel_values(x_CHW) for x_CHW in x_NCHW])
    taps, _ = encoder.taps(Inputs(features_BTD=jnp.asarray(items_NPF)), range(encoder.depth))
    return np.stack([np.asarray(taps.layer(layer), np.float32) for layer in range(encoder.depth)])


def difference(found, expected) -> float:
    """The largest difference of any layer [L, ...], of the largest expected value of that layer."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    rest = tuple(range(1, found.ndim))
    return float(np.max(np.abs(found - expected).max(rest) / np.abs(expected).max(rest)))
