"""Anchor boxes: what region proposal networks start from. Constants of an image size, so they are made in numpy."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eqvision.names import nearest

Numbers = Sequence[int | float]
Pairs = Sequence[tuple[int, int]]  # (height, width) or (down, across) of each level


class AnchorRule(NamedTuple):
    """How the boxes of one cell are made: corners on whole pixels or not, and which of two lists runs faster.

    With ``sizes_inside`` the order is (ratio 0, size 0), (ratio 0, size 1) ..., else (size 0, ratio 0), (size 0,
    ratio 1) ...; with one size for each level, as feature pyramids have it, both are the same.
    """

    rounded: bool
    sizes_inside: bool


ANCHOR_RULES: dict[str, AnchorRule] = {
    "torchvision": AnchorRule(rounded=True, sizes_inside=True),
    "detectron2": AnchorRule(rounded=False, sizes_inside=False),
    "mmdet": AnchorRule(rounded=False, sizes_inside=True),
}


def cell_anchors(sizes: Numbers, aspect_ratios: Numbers, *, dialect: str) -> Float[np.ndarray, "anchors 4"]:
    """The boxes of one cell, around (0, 0), in pixels: every size (root of the area) with every ratio height / width.

    ``dialect`` is a name in ``ANCHOR_RULES``. torchvision rounds corners, half to even: 32 pixels at ratio 0.5 become
    (-23, -11, 23, 11). mmdet's scales are sizes over the stride.
    """
    rule = _rule(dialect)
    _check_positive(sizes=sizes, aspect_ratios=aspect_ratios)
    ratio, size = np.asarray(aspect_ratios, np.float64), np.asarray(sizes, np.float64)
    ratio, size = (ratio[:, None], size) if rule.sizes_inside else (ratio, size[:, None])
    height, width = (np.ravel(size * np.sqrt(factor)) for factor in (ratio, 1 / ratio))
    boxes = np.stack([-width, -height, width, height], axis=-1) / 2
    return (np.round(boxes) if rule.rounded else boxes).astype(np.float32)


def anchor_grid(
    cell: Float[np.ndarray, "anchors 4"], grid: tuple[int, int], stride: tuple[int, int], *, offset: float = 0.0
) -> Float[np.ndarray, "cells 4"]:
    """The boxes of all cells of a map of ``grid`` (height, width), a ``stride`` (down, across) of pixels apart.

    Rows run over y, then x, then the boxes of ``cell``, as a head's (h, w, anchors) output does. The first cell's
    boxes are around (offset * stride, offset * stride): 0 in all published models, 0.5 for centres of cells.
    """
    y, x = (
        (np.arange(count, dtype=np.float32) + np.float32(offset)) * step
        for count, step in zip(grid, stride, strict=True)
    )
    y, x = np.meshgrid(y, x, indexing="ij")
    centre = np.stack([x, y, x, y], axis=-1).astype(np.float32)
    return (centre[:, :, None] + cell).reshape(-1, 4)


def pyramid_anchors(
    grids: Pairs,
    strides: Pairs,
    *,
    sizes: Sequence[Numbers],
    aspect_ratios: Numbers = (0.5, 1.0, 2.0),
    dialect: str,
    offset: float = 0.0,
) -> tuple[Float[np.ndarray, "_ 4"], ...]:
    """``anchor_grid`` of every level; ``sizes`` has the list of each. torchvision's strides: ``strides_of``."""
    if not len(grids) == len(strides) == len(sizes):
        raise ValueError(
            f"{len(grids)} grids, {len(strides)} strides and {len(sizes)} lists of sizes; expected one of each for"
            " every level"
        )
    cells = [cell_anchors(level, aspect_ratios, dialect=dialect) for level in sizes]
    levels = zip(cells, grids, strides, strict=True)
    return tuple(anchor_grid(cell, grid, stride, offset=offset) for cell, grid, stride in levels)


def strides_of(grids: Pairs, image_size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """(down, across) of every level as torchvision takes them: size of the padded image // size of the map.

    That is 61 and not 64 for the coarsest of five levels at 800 pixels, whose map has 13 cells. The other dialects
    take the nominal 4, 8, 16, 32, 64.
    """
    return tuple((image_size[0] // height, image_size[1] // width) for height, width in grids)


def anchors_on_image(
    grids: Pairs, strides: Pairs, per_cell: int, image_sizes: Int[Array, "b 2"]
) -> tuple[Bool[Array, "b _"], ...]:
    """For every level and image, which anchors belong to cells that begin inside the image's (height, width).

    So that neither proposals nor samples come from padding, which is wider here, where shapes are few, than in the
    references. mmdet leaves such cells out; torchvision and detectron2 use all cells of the padded batch.
    """
    levels = zip(grids, strides, strict=True)
    return tuple(_cells_on_image(grid, stride, per_cell, image_sizes) for grid, stride in levels)


def _cells_on_image(
    grid: tuple[int, int], stride: tuple[int, int], per_cell: int, image_sizes: Int[Array, "b 2"]
) -> Bool[Array, "b cells"]:
    rows, columns = (np.arange(grid[i]) * stride[i] < image_sizes[:, i, None] for i in range(2))
    cells = (rows[:, :, None] & columns[:, None, :]).reshape(len(image_sizes), -1, 1)
    return jnp.broadcast_to(cells, (*cells.shape[:2], per_cell)).reshape(len(image_sizes), -1)


def _rule(dialect: str) -> AnchorRule:
    if dialect not in ANCHOR_RULES:
        raise nearest(dialect, list(ANCHOR_RULES), "dialect of anchors")
    return ANCHOR_RULES[dialect]


def _check_positive(*, sizes: Numbers, aspect_ratios: Numbers) -> None:
    for name, values in (("sizes", sizes), ("aspect_ratios", aspect_ratios)):
        if not len(values) or not all(value > 0 and math.isfinite(value) for value in values):
            raise ValueError(f"{name} {values}: expected at least one number, all above 0")
