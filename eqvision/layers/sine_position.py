"""Which cells of a feature map are image, and the sine position code of DETR that counts only those."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eqvision.ops.torch_resize import nearest_index

EPS = 1e-6


def size_mask(size: Int[Array, "b 2"], padded: tuple[int, int], map_size: tuple[int, int]) -> Bool[Array, "b h w"]:
    """True where a map of ``map_size`` cells over a ``padded`` canvas shows image, for images of ``size``.

    All are (height, width). DETR's rule: the canvas' mask resized by torch's nearest, in which cell i reads the pixel
    floor(i * padded / map). ``jax.image.resize`` reads the cell's centre, and calls fewer cells image.
    """
    rows, columns = (jnp.asarray(nearest_index(old, new)) for old, new in zip(padded, map_size, strict=True))
    return (rows < size[:, :1])[:, :, None] & (columns < size[:, 1:])[:, None, :]


def sine_position(
    mask: Bool[Array, "b h w"], width: int, *, offset: float = 0.0, temperature: float = 10_000.0
) -> Float[Array, "b h w {width}"]:
    """Sines and cosines of the place within the image: DETR's ``PositionEmbeddingSine``, normalised to 2 pi.

    The first half of the channels encodes the row, the second the column, sine and cosine in turn; ``width`` is
    divisible by 4. Rows are counted from 1 over the cells where ``mask`` is True (image), which lie at the top left.
    ``offset`` is 0 in DETR and -0.5 in Deformable DETR. float32.
    A column without a cell of image (or a row) has coordinate 0: Deformable DETR divides by 1e-6 there, and the
    sines of such numbers are noise that differs between devices. No other cell reads them.
    """
    if width % 4:
        raise ValueError(f"sine_position: width must be divisible by 4 (sine and cosine for two axes), got {width}")
    axes = (_coordinate(mask, axis, offset) for axis in (1, 2))
    return jnp.concatenate([_waves(coordinate, width // 2, temperature) for coordinate in axes], axis=-1)


def _coordinate(mask: Bool[Array, "b h w"], axis: int, offset: float) -> Float[Array, "b h w"]:
    """From just above 0 to 2 pi along the axis of each image, and 2 pi behind it."""
    count = jnp.cumsum(mask.astype(jnp.float32), axis=axis)
    last = jnp.max(count, axis=axis, keepdims=True)
    return jnp.where(last > 0, (count + offset) / (last + EPS), 0.0) * (2 * math.pi)


def _waves(coordinate: Float[Array, "b h w"], width: int, temperature: float) -> Float[Array, "b h w {width}"]:
    exponent = 2 * (np.arange(width // 2, dtype=np.float32)) / np.float32(width)
    angles = coordinate[..., None] / (np.float32(temperature) ** exponent)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*coordinate.shape, width)
