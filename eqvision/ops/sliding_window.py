"""Maps of images that are larger than what a network is given at once, or at several scales; and back to the file.

``predict`` is a network closed over its parameters: images ``[b h w c]``, normalised, to maps ``[b h w k]``.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from eqvision.ops.collectives import vary_like
from eqvision.ops.torch_resize import linear_taps, resize_bilinear

Predict = Callable[[Float[Array, "b h w c"]], Float[Array, "b h w k"]]
Size = tuple[int, int]  # height, width


def window_starts(length: int, window: int, stride: int) -> tuple[int, ...]:
    """Where windows begin along a side: every ``stride`` pixels, and the last one moved back to end with the image.

    Raises ValueError for a stride outside 1..window, which would leave pixels out.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} for windows of {window} pixels; expected 1 to {window}")
    last = max(0, length - window)
    return tuple(min(start, last) for start in range(0, last + stride, stride))


def sliding_window(
    predict: Predict, images: Float[Array, "b h w c"], *, window: Size, stride: Size
) -> Float[Array, "b h w k"]:
    """Mean of the maps of all windows that a pixel lies in, in float32. One window at a time, one compilation.

    Images smaller than the window are padded with zeros, and the map cut. Logits are averaged as they are, as in
    mmsegmentation's "slide" inference. For images of many sizes there is ``sliding_window_on_host``.
    """
    _, height, width, _ = images.shape
    below, behind = max(0, window[0] - height), max(0, window[1] - width)
    padded = jnp.pad(images, ((0, 0), (0, below), (0, behind), (0, 0)))
    starts = _grid(padded.shape[1:3], window, stride)

    def at(corner: Int[Array, " 2"]) -> Float[Array, "b _ _ k"]:
        part = lax.dynamic_slice(padded, (0, corner[0], corner[1], 0), (len(images), *window, images.shape[-1]))
        return predict(part).astype(jnp.float32)

    if len(starts) == 1:
        return at(jnp.zeros(2, jnp.int32))[:, :height, :width]

    def step(total: Float[Array, "b h w k"], corner: Int[Array, " 2"]) -> tuple[Float[Array, "b h w k"], None]:
        place = (0, corner[0], corner[1], 0)
        found = at(corner)
        return lax.dynamic_update_slice(total, lax.dynamic_slice(total, place, found.shape) + found, place), None

    classes = jax.eval_shape(at, jnp.zeros(2, jnp.int32)).shape[-1]
    empty = vary_like(jnp.zeros((*padded.shape[:3], classes), jnp.float32), images)
    total, _ = lax.scan(step, empty, jnp.array(starts))
    return (total / _times(starts, padded.shape[1:3], window)[..., None])[:, :height, :width]


def sliding_window_on_host(
    predict: Callable[[Float32[np.ndarray, "n h w c"]], Float[Array, "n h w k"] | Float[np.ndarray, "n h w k"]],
    image: Float32[np.ndarray, "h w c"],
    *,
    window: Size,
    stride: Size,
    windows_at_once: int = 4,
) -> Float32[np.ndarray, "h w k"]:
    """The same for one image in numpy: ``predict`` (under ``jax.jit``) sees ``windows_at_once`` windows, for any image.

    So it is compiled once. Raises ValueError for fewer than one window at once.
    """
    if windows_at_once < 1:
        raise ValueError(f"windows_at_once={windows_at_once}; expected 1 or more")
    height, width, channels = image.shape
    padded = np.zeros((max(height, window[0]), max(width, window[1]), channels), np.float32)
    padded[:height, :width] = image
    starts = _grid(padded.shape[:2], window, stride)
    total: np.ndarray | None = None
    for first in range(0, len(starts), windows_at_once):
        corners = starts[first : first + windows_at_once]
        parts = np.zeros((windows_at_once, *window, channels), np.float32)
        for row, (top, left) in enumerate(corners):
            parts[row] = padded[top : top + window[0], left : left + window[1]]
        maps = np.asarray(predict(parts), np.float32)
        total = np.zeros((*padded.shape[:2], maps.shape[-1]), np.float32) if total is None else total
        for map_, (top, left) in zip(maps, corners, strict=False):
            total[top : top + window[0], left : left + window[1]] += map_
    assert total is not None
    return (total / _times(starts, padded.shape[:2], window)[..., None])[:height, :width]


def multi_scale(
    predict: Predict,
    images: Float[Array, "b h w c"],
    *,
    scales: Sequence[float | int] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
    flip: bool = True,
    multiple: int = 32,
) -> Float[Array, "b h w k"]:
    """Mean of the softmax of ``predict`` at several scales and, with ``flip``, of the mirrored images, in float32.

    Sides at each scale are rounded to ``multiple`` (the stride of the network), at least that. Images and logits are
    resized bilinearly. The default scales are those of published results with "multi-scale" behind them. Raises
    ValueError for no scale, and for one that is not positive.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales={tuple(scales)}; expected factors of the image, at least one, all above 0")
    height, width = images.shape[1:3]
    size, total = (height, width), jnp.zeros(())
    for scale in scales:
        rounded = [max(1, round(side * scale / multiple)) * multiple for side in size]
        scaled = resize_bilinear(images, (rounded[0], rounded[1]))
        for mirrored in (False, True)[: 1 + flip]:
            logits = predict(scaled[:, :, ::-1] if mirrored else scaled).astype(jnp.float32)
            logits = resize_bilinear(logits[:, :, ::-1] if mirrored else logits, size)
            total = total + jax.nn.softmax(logits, axis=-1)
    return total / (len(scales) * (1 + flip))


def restored_logits(
    logits: Float[np.ndarray, "h w k"], size: Size, original_size: Size
) -> Float32[np.ndarray, "new_h new_w k"]:
    """Logits of a padded image at the size of its file, on the host: cut to ``size`` first, then bilinear.

    So nothing of the padding gets into the image at its border. The argmax of the result is the map of classes; labels
    themselves are never interpolated.
    """
    inside = np.asarray(logits[: size[0], : size[1]], np.float32)
    for axis, new in enumerate(original_size):
        cells, shares = linear_taps(inside.shape[axis], new)
        spread = (slice(None), None, None) if axis == 0 else (None, slice(None), None)
        parts = [inside.take(cell, axis=axis) * share[spread] for cell, share in zip(cells, shares, strict=True)]
        inside = functools.reduce(np.add, parts)
    return inside


def _grid(size: tuple[int, ...], window: Size, stride: Size) -> Int[np.ndarray, "n 2"]:
    rows, columns = (window_starts(*each) for each in zip(size, window, stride, strict=True))
    return np.array([(top, left) for top in rows for left in columns], np.int32)


def _times(starts: Int[np.ndarray, "n 2"], size: tuple[int, ...], window: Size) -> Float32[np.ndarray, "h w"]:
    """How many windows each pixel lies in."""
    times = np.zeros(size, np.float32)
    for top, left in starts:
        times[top : top + window[0], left : left + window[1]] += 1
    return times
