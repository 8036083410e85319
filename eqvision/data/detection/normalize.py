"""Pixels of padded batches -> floats, on the device."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt8

from eqvision.data.transforms import normalize
from eqvision.types import PaddedImages


def normalize_padded(
    images: UInt8[Array, "b h w c"], size: Int[Array, "b 2"], mean: Sequence[float], std: Sequence[float]
) -> PaddedImages:
    """``(images / 255 - mean) / std`` in float32 where there is image, and zero in the padding, as detectors expect.

    Raises ValueError unless mean and std have one value, or one per channel.
    """
    inside = image_area(size, images.shape[1], images.shape[2])
    return PaddedImages(jnp.where(inside[..., None], normalize(images, mean, std), 0), size)


def image_area(size: Int[Array, "b 2"], height: int, width: int) -> Bool[Array, "b h w"]:
    """True where a pixel of the batch is image, False in the padding to the right and below."""
    rows, columns = jnp.arange(height)[None, :, None], jnp.arange(width)[None, None, :]
    return (rows < size[:, 0, None, None]) & (columns < size[:, 1, None, None])
