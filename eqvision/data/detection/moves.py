"""What moves pixels: flip, resize, crop, each done alike to image, boxes and masks; and plans that draw them.

A plan is drawn from the image's size alone, before any pixel is read. So the size that comes out is known for images
that have not been decoded, and batches of one shape can be put together ahead of time (``buckets.py``).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from eqvision.data.detection.annotations import DetectionExample
from eqvision.data.detection.sizes import Size, resized_size, scaled_size
from eqvision.data.transforms import resize


class Flip(NamedTuple):
    """Mirrored left to right: x becomes width - x."""


class Resize(NamedTuple):
    """To this height and width; masks by the nearest pixel centre."""

    height: int
    width: int


class Crop(NamedTuple):
    """The region of this height and width at (top, left), which lies within the image."""

    top: int
    left: int
    height: int
    width: int


Move = Flip | Resize | Crop
Plan = Callable[[Size, np.random.Generator], tuple[Move, ...]]


def size_after(size: Size, moves: Sequence[Move]) -> Size:
    """Height and width of an image of ``size`` once it has been moved."""
    for move in moves:
        size = size if isinstance(move, Flip) else (move.height, move.width)
    return size


def move_example(example: DetectionExample, moves: Sequence[Move], interpolation: str = "bilinear") -> DetectionExample:
    """Image, boxes and masks moved alike. Boxes may reach out of the image afterwards: see ``clipped``."""
    masks = None if example.masks is None else move_masks(example.masks, moves)
    for move in moves:
        if isinstance(move, Flip):
            example = _flipped(example)
        elif isinstance(move, Resize):
            example = _resized(example, move, interpolation)
        else:
            example = _cropped(example, move)
    return example._replace(masks=masks)


def move_masks(masks: UInt8[np.ndarray, "g h w"], moves: Sequence[Move]) -> UInt8[np.ndarray, "g new_h new_w"]:
    """All moves in one: each only says which row and column a pixel comes from, and masks are many."""
    if not moves:
        return masks
    rows, columns = (np.arange(side) for side in masks.shape[1:])
    for move in moves:
        if isinstance(move, Flip):
            columns = columns[::-1]
        elif isinstance(move, Resize):
            rows, columns = rows[_nearest(len(rows), move.height)], columns[_nearest(len(columns), move.width)]
        else:
            rows, columns = rows[move.top : move.top + move.height], columns[move.left : move.left + move.width]
    return masks.take(rows, axis=1).take(columns, axis=2)


def resize_masks(masks: UInt8[np.ndarray, "g h w"], size: Size) -> UInt8[np.ndarray, "g new_h new_w"]:
    """By the nearest centre, so that masks stay on their pixels (torch's "nearest" moves them by half a pixel)."""
    return move_masks(masks, (Resize(*size),))


def _nearest(old: int, new: int) -> np.ndarray:
    return ((np.arange(new) + 0.5) * old / new).astype(np.int64)


def _flipped(example: DetectionExample) -> DetectionExample:
    width = np.float32(example.image.shape[1])
    x1, y1, x2, y2 = example.boxes.T
    return example._replace(image=example.image[:, ::-1], boxes=np.stack([width - x2, y1, width - x1, y2], axis=1))


def _resized(example: DetectionExample, move: Resize, interpolation: str) -> DetectionExample:
    height, width = example.image.shape[:2]
    factors = np.array([move.width / width, move.height / height] * 2, np.float32)
    image = resize(example.image, (move.height, move.width), interpolation)
    return example._replace(image=image, boxes=example.boxes * factors)


def _cropped(example: DetectionExample, move: Crop) -> DetectionExample:
    rows, columns = slice(move.top, move.top + move.height), slice(move.left, move.left + move.width)
    boxes = example.boxes - np.array([move.left, move.top] * 2, np.float32)
    return example._replace(image=example.image[rows, columns], boxes=boxes)


# Plans. Each draws as many numbers as its own case needs; what follows it in the same generator depends on them.


def no_moves(size: Size, rng: np.random.Generator) -> tuple[Move, ...]:
    """The image as it is."""
    return ()


def in_turn(size: Size, rng: np.random.Generator, *, plans: Sequence[Plan]) -> tuple[Move, ...]:
    """One plan after the other, each for the size that the one before it leaves."""
    moves: tuple[Move, ...] = ()
    for plan in plans:
        moves += plan(size_after(size, moves), rng)
    return moves


def either(
    size: Size, rng: np.random.Generator, *, first: Plan, second: Plan, probability: float | int
) -> tuple[Move, ...]:
    """The first plan with this probability, else the second."""
    return (first if rng.random() < probability else second)(size, rng)


def random_flip_plan(size: Size, rng: np.random.Generator, *, probability: float | int) -> tuple[Move, ...]:
    """Mirrored with this probability."""
    return (Flip(),) if rng.random() < probability else ()


def resize_plan(size: Size, rng: np.random.Generator, *, to: Size) -> tuple[Move, ...]:
    """To a fixed height and width, whatever the shape."""
    return (Resize(*to),)


def shortest_side_plan(
    size: Size, rng: np.random.Generator, *, shortest: Sequence[int], longest: int | None, rounding: str
) -> tuple[Move, ...]:
    """The shorter side to one of ``shortest``, drawn evenly; see ``resized_size``."""
    chosen = shortest[int(rng.integers(len(shortest)))] if len(shortest) > 1 else shortest[0]
    return (Resize(*resized_size(size, chosen, longest, rounding)),)


def random_crop_plan(size: Size, rng: np.random.Generator, *, smallest: int, largest: int) -> tuple[Move, ...]:
    """A region whose sides are even in ``smallest`` .. ``largest``, as far as the image reaches."""
    height, width = (_drawn(rng, min(smallest, side), min(largest, side)) for side in size)
    return (Crop(_drawn(rng, 0, size[0] - height), _drawn(rng, 0, size[1] - width), height, width),)


def scale_jitter_plan(
    size: Size, rng: np.random.Generator, *, target: Size, scale: tuple[float, float]
) -> tuple[Move, ...]:
    """Resized to fit ``target`` times a scale even in ``scale``, then a region of at most ``target`` cut out.

    One number in 0..1 says where the region lies along both sides, as in detectron2.
    """
    new = scaled_size(size, target, rng.uniform(*scale))
    place = rng.random()
    height, width = (min(side, limit) for side, limit in zip(new, target, strict=True))
    top, left = (round(place * (side - kept)) for side, kept in zip(new, (height, width), strict=True))
    return (Resize(*new), *((Crop(top, left, height, width),) if (height, width) != new else ()))


def shifted_region_plan(
    size: Size, rng: np.random.Generator, *, target: Size, scales: Sequence[float], border: int
) -> tuple[Move, ...]:
    """A region of the shape of ``target`` around a drawn point, brought to ``target``, as far as the image reaches.

    The region is one of ``scales`` times as large as what just holds the image, and its middle lies at least
    ``border`` pixels within the image, or less in small images: the first half of it that fits twice.
    """
    new = scaled_size(size, target, 1 / scales[int(rng.integers(len(scales)))])
    spans = []
    for side, resized, room in zip(size, new, target, strict=True):
        margin = _margin(side, border)
        middle = int(rng.integers(margin, side - margin)) / side * resized
        start = round(middle - room / 2)
        first = min(max(0, start), resized - 1)
        spans.append((first, max(first + 1, min(resized, start + room))))
    (top, bottom), (left, right) = spans
    return Resize(*new), Crop(top, left, bottom - top, right - left)


def _margin(side: int, border: int) -> int:
    while side <= 2 * border:
        border //= 2
    return border


def _drawn(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))
