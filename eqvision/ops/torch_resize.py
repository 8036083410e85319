"""Resizing with the numbers of ``torch.nn.functional.interpolate`` (no antialias), for networks trained with it.

``jax.image.resize`` differs: its nearest reads cell centres, its cubic has a = -0.5, and its border weights are
rescaled where torch repeats the border. One axis after the other, by gathers of its 2 or 4 taps: products with
interpolation matrices took about ten times as long on processors. Results have the input's type; the arithmetic is
float32.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Shaped

CUBIC = -0.75  # Keys' a in torch's bicubic

Taps = tuple[Int[np.ndarray, "_ _"], Float32[np.ndarray, "_ _"]]  # of each new cell (axis 1): old cells, their shares


def resize_nearest(x: Shaped[Array, "b h w c"], size: tuple[int, int]) -> Shaped[Array, "b h2 w2 c"]:
    """``mode="nearest"``: cell i reads cell floor(i * old / new), the first and not the middle one of those it covers.

    Any type, boolean masks too.
    """
    _check(size, "resize_nearest")
    return _nearest(_nearest(x, 1, size[0]), 2, size[1])


def resize_bilinear(
    x: Float[Array, "b h w c"], size: tuple[int, int], *, align_corners: bool = False
) -> Float[Array, "b h2 w2 c"]:
    """``mode="bilinear"``: two taps per axis also where the map shrinks.

    With ``align_corners`` the centres of the corner cells stay where they are, otherwise the outer edges do.
    """
    _check(size, "resize_bilinear")
    pairs = zip(x.shape[1:3], size, strict=True)
    return _apply(x, *(linear_taps(*pair, align_corners=align_corners) for pair in pairs))


def resize_bicubic(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """``mode="bicubic"``, ``align_corners=False``: four taps per axis, Keys' kernel with a = -0.75.

    Results can lie beyond the input's range.
    """
    _check(size, "resize_bicubic")
    return _apply(x, *(cubic_taps(*pair) for pair in zip(x.shape[1:3], size, strict=True)))


def nearest_index(old: int, new: int) -> Int[np.ndarray, " new"]:
    """For each of ``new`` cells, the cell of ``old`` that torch's nearest reads; its float32 rounding included."""
    index = np.floor(np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new)))
    return np.minimum(index.astype(np.int32), old - 1)


def linear_taps(old: int, new: int, *, align_corners: bool = False) -> Taps:
    """The two old cells around each new centre, and their shares; beyond the border both are the border's."""
    if old == new:
        return np.arange(new)[None], np.ones((1, new), np.float32)
    position = np.maximum(_positions(old, new, align_corners), 0)
    first = np.minimum(position.astype(int), old - 1)
    share = np.clip(position - first.astype(np.float32), 0, 1)
    return np.stack([first, np.minimum(first + 1, old - 1)]), np.stack([1 - share, share])


def cubic_taps(old: int, new: int) -> Taps:
    """The four old cells around each new centre, and their shares; taps beyond the border read the border."""
    position = _positions(old, new, align_corners=False)
    first = np.floor(position)
    taps = np.arange(-1, 3)[:, None]
    cells = np.clip(first.astype(int) + taps, 0, old - 1)
    return cells, _keys(np.abs(position - first - taps.astype(np.float32)))


def _positions(old: int, new: int, align_corners: bool) -> Float32[np.ndarray, " new"]:
    """Where each new centre lies among the old ones, with one rounding to float32 as torch's fused arithmetic has it.

    At position 1000 float32 knows only four decimals: exact positions would differ visibly.
    """
    if align_corners:
        scale = np.float32(old - 1) / np.float32(new - 1) if new > 1 else np.float32(0)
        return scale * np.arange(new, dtype=np.float32)
    scale = np.float32(old) / np.float32(new)
    return (float(scale) * (np.arange(new) + 0.5) - 0.5).astype(np.float32)


def _keys(distance: Float32[np.ndarray, "taps new"]) -> Float32[np.ndarray, "taps new"]:
    """Cubic convolution kernel (Keys 1981) up to distance 2; in float64, for its terms cancel."""
    x, a = distance.astype(np.float64), CUBIC
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0)).astype(np.float32)


def _apply(x: Float[Array, "b h w c"], rows: Taps, columns: Taps) -> Float[Array, "b h2 w2 c"]:
    wide = _weighted(_weighted(x.astype(jnp.float32), 1, rows), 2, columns)
    return wide.astype(x.dtype)


def _weighted(x: Float[Array, "b h w c"], axis: int, taps: Taps) -> Float[Array, "b _ _ c"]:
    shape = [-1 if number == axis else 1 for number in range(4)]
    parts = [jnp.take(x, cells, axis=axis) * share.reshape(shape) for cells, share in zip(*taps, strict=True)]
    return functools.reduce(jnp.add, parts)


def _nearest(x: Shaped[Array, "b h w c"], axis: int, new: int) -> Shaped[Array, "b _ _ c"]:
    """By repetition where that gives the same cells: the gradient of a gather is a scatter."""
    old = x.shape[axis]
    index = nearest_index(old, new)
    if np.array_equal(index, np.repeat(np.arange(old), max(1, new // old))):
        return jnp.repeat(x, new // old, axis=axis)
    return jnp.take(x, index, axis=axis)


def _check(size: tuple[int, int], name: str) -> None:
    if min(size) < 1:
        raise ValueError(f"{name}: size must be (height, width) of at least 1 cell each, got {size}")
