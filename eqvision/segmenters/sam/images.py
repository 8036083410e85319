"""From an image to SAM's input, and from its masks back to the image: sizes, resizing and padding as published."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from eqvision.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize, resize
from eqvision.ops.torch_resize import linear_taps

Size = tuple[int, int]  # height, width


class Geometry(NamedTuple):
    """Sizes of an image, of what it becomes in the model's input, and of that input, whose rest is padding."""

    original: Size
    inner: Size
    padded: Size

    @property
    def scale(self) -> tuple[float, float]:
        """By how much x and y grow on the way into the model."""
        return self.inner[1] / self.original[1], self.inner[0] / self.original[0]


def geometry(size: Size, side: int = 1024) -> Geometry:
    """The longer side becomes ``side``, the shorter one is rounded half up. Raises ValueError for empty images."""
    if min(size) < 1:
        raise ValueError(f"SAM: an image of {size[0]}x{size[1]} has no pixels")
    scale = side / max(size)
    inner = (max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5)))
    return Geometry(size, inner, (side, side))


def prepare_image(image: UInt8[np.ndarray, "h w 3"], side: int = 1024) -> Float32[np.ndarray, "{side} {side} 3"]:
    """Resized by Pillow (bilinear, antialiased), normalised, and padded by zeros at the right and the bottom."""
    inner = geometry((image.shape[0], image.shape[1]), side).inner
    prepared = np.zeros((side, side, 3), np.float32)
    prepared[: inner[0], : inner[1]] = normalize(resize(image, inner, "bilinear"), IMAGENET_MEAN, IMAGENET_STD)
    return prepared


def to_input(points: Float[np.ndarray, "*n 2"], sizes: Geometry) -> Float[np.ndarray, "*n 2"]:
    """Points x, y of the image, in pixels of the model's input."""
    return points * np.asarray(sizes.scale, points.dtype)


def resize_logits(logits: Float[np.ndarray, "*n h w"], sizes: Geometry) -> Float32[np.ndarray, "*n h2 w2"]:
    """Mask logits at the size of the image: bilinear to that of the input, cropped, bilinear to the original.

    Both steps of an axis are one matrix, and a mask two products.
    """
    rows, columns = (
        _twice(logits.shape[axis - 2], sizes.padded[axis], sizes.inner[axis], sizes.original[axis]) for axis in (0, 1)
    )
    return rows @ np.asarray(logits, np.float32) @ columns.T


def resize_masks(
    logits: Float[np.ndarray, "*n h w"], sizes: Geometry, *, threshold: float = 0.0
) -> Bool[np.ndarray, "*n h2 w2"]:
    """Where ``resize_logits`` are above ``threshold``; one mask after the other, to bound the memory."""
    flat = np.asarray(logits).reshape(-1, *logits.shape[-2:])
    masks = np.zeros((len(flat), *sizes.original), bool)
    for mask, each in zip(masks, flat, strict=True):
        np.greater(resize_logits(each, sizes), threshold, out=mask)
    return masks.reshape(*logits.shape[:-2], *sizes.original)


def _twice(cells: int, padded: int, inner: int, original: int) -> Float32[np.ndarray, "original cells"]:
    return _matrix(inner, original) @ _matrix(cells, padded)[:inner]


def _matrix(old: int, new: int) -> Float32[np.ndarray, "new old"]:
    """How much each of ``old`` cells counts in each of ``new``, with torch's numbers."""
    matrix = np.zeros((new, old), np.float32)
    for cells, shares in zip(*linear_taps(old, new), strict=True):
        np.add.at(matrix, (np.arange(new), cells), shares)
    return matrix
