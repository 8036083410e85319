"""Resizing of maps on the device (position embeddings, features)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ResizeMethod = Literal["nearest", "linear", "cubic", "lanczos3"]


def resize_images(
    images: Float[Array, "b h w c"],
    size: tuple[int, int],
    *,
    method: ResizeMethod = "linear",
    antialias: bool = True,
) -> Float[Array, "b h2 w2 c"]:
    """Resize with pixel centres at half integers, computed in float32 and returned in the input's type.

    ``method`` and ``antialias`` are those of ``jax.image.resize``; cubic is Keys' kernel with a = -0.5.
    """
    b, _, _, c = images.shape
    resized = jax.image.resize(images.astype(jnp.float32), (b, *size, c), method, antialias=antialias)
    return resized.astype(images.dtype)
