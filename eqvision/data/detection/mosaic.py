"""Mosaics: several images as tiles of one, which shows detectors smaller objects (OWL-ViT's appendix A1.5)."""

import functools
from dataclasses import dataclass

import numpy as np

from eqvision.data.detection.annotations import DetectionExample
from eqvision.data.detection.moves import (
    Crop,
    Move,
    Plan,
    in_turn,
    move_example,
    no_moves,
    random_flip_plan,
    resize_plan,
    scale_jitter_plan,
)
from eqvision.data.detection.sizes import Size
from eqvision.data.detection.source import DetectionSource
from eqvision.data.detection.transforms import clipped, keep_objects
from eqvision.data.transforms import random_region


@dataclass(frozen=True)
class Mosaic:
    """A transform: the example, or it and others of ``source`` in a square grid, brought to ``size`` x ``size``.

    The side of the grid is one of ``grids`` with ``probabilities``; the other examples are drawn evenly. Each is
    flipped (``flip``: how often), a region of it with an area even in ``crop`` is cut out (None: the whole), and it is
    brought to its tile: at the upper left, where what is left over gets the value ``fill`` (0..255), or squeezed
    (``pad=False``). Objects of which less than the share ``least_left`` is left by the cut are dropped. What comes out
    is whole image: nothing behind it is padding any more. Masks are dropped. Raises ValueError for values that do not
    fit.
    """

    source: DetectionSource
    size: int
    grids: tuple[int, ...] = (1, 2, 3)
    probabilities: tuple[float, ...] = (0.4, 0.3, 0.3)
    flip: float = 0.5
    crop: tuple[float, float] | None = (0.3, 1.0)
    least_left: float = 0.6
    pad: bool = True
    fill: int = 128

    def __post_init__(self):
        fitting = len(self.grids) == len(self.probabilities) and abs(sum(self.probabilities) - 1) < 1e-6
        if not self.grids or min(self.grids) < 1 or not fitting or min(self.probabilities) < 0:
            raise ValueError(
                f"grids {self.grids} with probabilities {self.probabilities}; expected sides of 1 or more, and for "
                "each a probability, of sum 1"
            )
        wrong = [grid for grid in self.grids if self.size % grid]
        if wrong:
            raise ValueError(f"a mosaic of {self.size} pixels cannot be cut into {wrong[0]} equal tiles along a side")
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop={self.crop}; expected shares of the area, 0 < smallest <= largest <= 1")

    def __call__(self, example: DetectionExample, rng: np.random.Generator) -> DetectionExample:
        grid = int(rng.choice(self.grids, p=self.probabilities))
        others = [self.source[int(rng.integers(len(self.source)))] for _ in range(grid * grid - 1)]
        side = self.size // grid
        tiles = [self._tile(each, side, rng) for each in (example, *others)]
        canvas = np.full((self.size, self.size, example.image.shape[2]), self.fill, np.uint8)
        boxes = []
        for number, tile in enumerate(tiles):
            top, left = (place * side for place in divmod(number, grid))
            height, width = tile.image.shape[:2]
            canvas[top : top + height, left : left + width] = tile.image
            boxes.append(tile.boxes + np.array([left, top] * 2, np.float32))
        labels = np.concatenate([tile.labels for tile in tiles])
        weight = min(tile.weight for tile in tiles)  # 0 where an image is corrupt
        whole = example._replace(image=canvas, boxes=np.concatenate(boxes), labels=labels, masks=None, weight=weight)
        return whole

    def _tile(self, example: DetectionExample, side: int, rng: np.random.Generator) -> DetectionExample:
        height, width = example.image.shape[:2]
        moves = self._plan(side)((height, width), rng)
        moved = move_example(example._replace(masks=None), moves)
        within = clipped_boxes(moved)
        kept = _areas(within) >= self.least_left * _areas(moved.boxes)
        return clipped(keep_objects(moved, kept))

    def _plan(self, side: int) -> Plan:
        flip = functools.partial(random_flip_plan, probability=self.flip)
        cut = no_moves if self.crop is None else functools.partial(region_plan, scale=self.crop)
        fitted = functools.partial(scale_jitter_plan, target=(side, side), scale=(1.0, 1.0))
        fit = fitted if self.pad else functools.partial(resize_plan, to=(side, side))
        return functools.partial(in_turn, plans=(flip, cut, fit))


def region_plan(size: Size, rng: np.random.Generator, *, scale: tuple[float, float]) -> tuple[Move, ...]:
    """A region with an area even in ``scale`` of the image's, and an aspect ratio of 3/4 to 4/3."""
    return (Crop(*random_region(size, rng, scale)),)


def clipped_boxes(example: DetectionExample) -> np.ndarray:
    """Boxes cut to the image; some may be empty."""
    height, width = example.image.shape[:2]
    return np.clip(example.boxes, 0, np.array([width, height] * 2, np.float32))


def _areas(boxes: np.ndarray) -> np.ndarray:
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    return sides[:, 0] * sides[:, 1]
