"""Convolution that reads each of its window's points at an offset of its own, with a weight of its own (DCNv2)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from eqvision.ops.deformable import multi_scale_deformable_sampling


def deform_conv(
    x: Float[Array, "b h w i"],
    offsets: Float[Array, "b h2 w2 groups points 2"],
    mask: Float[Array, "b h2 w2 groups points"],
    weight: Float[Array, "kh kw i o"],
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    block_size: int | None = 4096,
    remat: bool = True,
) -> Float[Array, "b h2 w2 o"]:
    """Modulated deformable convolution without bias (Zhu et al. 2019, equation 1).

    ``offsets`` are (y, x) in cells, from where the window's point lies in an ordinary convolution with ``padding``;
    ``points`` go through the window row by row. What is read there, bilinearly and as zero outside the map, is
    multiplied by ``mask``, which is taken as it is (networks put a sigmoid in front; ones give DCNv1). Input channels
    are split into ``groups`` equal parts, each with its own offsets and mask. Gradients reach all four arrays.

    The values read are ``points`` times those of the map; they are made for ``block_size`` output cells of all images
    at a time (None: for all at once), and with ``remat`` made again in the gradient instead of kept.
    """
    _check(x, offsets, mask, weight, stride, padding, dilation, block_size)
    places = _places(offsets, weight.shape[:2], stride, padding, dilation)
    size = np.array([x.shape[2], x.shape[1]], np.float32)
    locations = (places[..., ::-1] + 0.5) / size  # (x, y), the map being 1 wide and high
    values = x.reshape(*x.shape[:3], mask.shape[3], -1)
    product = functools.partial(_product, values, weight.astype(x.dtype).reshape(-1, weight.shape[-1]))
    product = jax.checkpoint(product, prevent_cse=False) if remat else product
    locations, flat_mask = (part.reshape(part.shape[0], -1, *part.shape[3:]) for part in (locations, mask))
    y = _in_blocks(product, locations, flat_mask, None if block_size is None else max(1, block_size // x.shape[0]))
    return y.reshape(*mask.shape[:3], -1)


def _places(
    offsets: Float[Array, "b h2 w2 groups points 2"], window: tuple[int, ...], stride: int, padding: int, dilation: int
) -> Float32[Array, "b h2 w2 groups points 2"]:
    """(y, x) in cells, 0 being the centre of the first."""
    height, width = offsets.shape[1:3]
    starts = np.moveaxis(np.indices((height, width)), 0, -1) * stride - padding
    points = np.moveaxis(np.indices(window), 0, -1).reshape(-1, 2) * dilation
    grid = (starts[:, :, None, None] + points).astype(np.float32)
    return offsets.astype(jnp.float32) + grid


def _product(
    values: Float[Array, "b h w groups d"],
    weight: Float[Array, "points_i o"],
    locations: Float[Array, "b q groups points 2"],
    mask: Float[Array, "b q groups points"],
) -> Float[Array, "b q o"]:
    """Each point of each output cell is a query of its own for ``multi_scale_deformable_sampling``."""
    b, q, groups, points = mask.shape
    queries = (x.swapaxes(2, 3).reshape(b, q * points, groups, 1, 1, *x.shape[4:]) for x in (locations, mask))
    columns = multi_scale_deformable_sampling((values,), *queries, block_size=None, remat=False)
    return columns.reshape(b, q, -1) @ weight


def _in_blocks(product, locations, mask, block: int | None) -> Float[Array, "b q o"]:
    """A loop over blocks of output cells of equal size; the last is padded."""
    b, q = mask.shape[:2]
    if block is None or q <= block:
        return product(locations, mask)
    blocks = -(-q // block)
    block = -(-q // blocks)

    def split(x):
        padded = jnp.pad(x, ((0, 0), (0, blocks * block - q)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(b, blocks, block, *x.shape[2:]), 1, 0)

    y = lax.map(lambda part: product(*part), (split(locations), split(mask)))
    return jnp.moveaxis(y, 0, 1).reshape(b, blocks * block, -1)[:, :q]


def _check(x, offsets, mask, weight, stride: int, padding: int, dilation: int, block_size: int | None) -> None:
    if stride < 1 or dilation < 1 or padding < 0 or (block_size is not None and block_size < 1):
        raise ValueError(
            f"deform_conv: stride {stride}, dilation {dilation} and block_size {block_size} must be at least 1, "
            f"padding {padding} at least 0"
        )
    groups = mask.shape[3]
    kernel = weight.shape[:2]
    size = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(x.shape[1:3], kernel, strict=True)]
    expected = (x.shape[0], *size, groups, kernel[0] * kernel[1])
    if mask.shape != expected or offsets.shape != (*expected, 2):
        raise ValueError(
            f"deform_conv: offsets {offsets.shape} and mask {mask.shape} for a map {x.shape} and a window {kernel} of "
            f"stride {stride}, padding {padding} and dilation {dilation}; expected {(*expected, 2)} and {expected}"
        )
    if weight.shape[2] != x.shape[3] or x.shape[3] % groups:
        raise ValueError(
            f"deform_conv: a weight {weight.shape} and {groups} groups do not fit a map of {x.shape[3]} channels"
        )
