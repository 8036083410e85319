"""Segmentation transforms on the host: ``transform(example, rng) -> example`` in numpy and Pillow.

Image and labels move alike, by the moves and plans of detection (``data/detection/moves.py``). The image is
interpolated; of the labels each pixel is that of the nearest centre, so classes never blend. What a transform leaves
smaller than the batch is padded by the stream, with ``IGNORE_LABEL``.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from eqvision.data.augment import color_jitter
from eqvision.data.detection.moves import (
    Crop,
    Flip,
    Move,
    Plan,
    Resize,
    in_turn,
    move_masks,
    no_moves,
    random_flip_plan,
    resize_plan,
    scale_jitter_plan,
    shortest_side_plan,
    size_after,
)
from eqvision.data.detection.sizes import Size
from eqvision.data.segmentation.source import SegmentationExample
from eqvision.data.transforms import INTERPOLATIONS, resize
from eqvision.names import nearest


@runtime_checkable
class LabelTransform(Protocol):
    """What streams apply. All randomness comes from ``rng``; ``output_size`` tells the size without the pixels."""

    def __call__(self, example: SegmentationExample, rng: np.random.Generator) -> SegmentationExample: ...

    def output_size(self, size: Size, rng: np.random.Generator) -> Size: ...


@dataclass(frozen=True)
class SegmentationTransform:
    """The moves that ``plan`` draws from the size of the image, then colour jitter of the image.

    ``color_jitter`` is the strength of brightness, contrast and saturation changes, 0 for none. ``interpolation`` is
    Pillow's, of the image. Raises UnknownNameError for another interpolation, ValueError for a strength outside 0..1.
    """

    plan: Plan = no_moves
    color_jitter: float | int = 0.0
    interpolation: str = "bilinear"

    def __post_init__(self):
        if self.interpolation not in INTERPOLATIONS:
            raise nearest(self.interpolation, list(INTERPOLATIONS), "interpolation")
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter={self.color_jitter}; expected 0 (none) to 1")

    def output_size(self, size: Size, rng: np.random.Generator) -> Size:
        """Height and width that ``self(example, rng)`` gives an image of ``size``, for a generator in that state."""
        return size_after(size, self.plan(size, rng))

    def __call__(self, example: SegmentationExample, rng: np.random.Generator) -> SegmentationExample:
        height, width = example.image.shape[:2]
        moves = self.plan((height, width), rng)  # draws first: output_size must see the same numbers
        image = move_image(example.image, moves, self.interpolation)
        if self.color_jitter:
            image = color_jitter(np.ascontiguousarray(image), rng, self.color_jitter)
        return example._replace(image=image, labels=move_labels(example.labels, moves))


def move_image(
    image: UInt8[np.ndarray, "h w c"], moves: Sequence[Move], interpolation: str = "bilinear"
) -> UInt8[np.ndarray, "new_h new_w c"]:
    """The image after these moves; ``interpolation`` is Pillow's."""
    for move in moves:
        if isinstance(move, Flip):
            image = image[:, ::-1]
        elif isinstance(move, Resize):
            image = resize(image, (move.height, move.width), interpolation)
        else:
            image = image[move.top : move.top + move.height, move.left : move.left + move.width]
    return image


def move_labels(labels: UInt8[np.ndarray, "h w"], moves: Sequence[Move]) -> UInt8[np.ndarray, "new_h new_w"]:
    """The labels after these moves, each that of the nearest pixel centre."""
    return move_masks(labels[None], moves)[0]


def resize_labels(labels: UInt8[np.ndarray, "h w"], size: Size) -> UInt8[np.ndarray, "new_h new_w"]:
    """To (height, width) by the nearest pixel centre: no class that was not there comes up."""
    return move_labels(labels, (Resize(*size),))


def random_scale_plan(
    size: Size, rng: np.random.Generator, *, scale: tuple[float, float], shortest: int | None
) -> tuple[Move, ...]:
    """Both sides times one factor even in ``scale``; with ``shortest``, of an image whose shorter side is that."""
    factor = rng.uniform(*scale) * (1.0 if shortest is None else shortest / min(size))
    new = (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))
    return () if new == size else (Resize(*new),)


def random_window_plan(size: Size, rng: np.random.Generator, *, window: Size) -> tuple[Move, ...]:
    """A random region of this size; of an image that is smaller along a side, all of that side."""
    height, width = (min(side, limit) for side, limit in zip(size, window, strict=True))
    top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
    return () if (height, width) == size else (Crop(top, left, height, width),)


# The usual recipes


def segmentation_train(
    crop: int | Size,
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    shortest: int | None = None,
    flip: float | int = 0.5,
    color_jitter: float | int = 0.0,
) -> SegmentationTransform:
    """Scaled by a factor even in ``scale``, a random region of ``crop``, and flip (Chen et al. 2018, section 4).

    ``shortest`` brings every image to that shorter side first, for data sets of images of many sizes. What is smaller
    than ``crop`` is padded by the stream, whose canvas should be ``crop``. ``scale=(1, 1)`` does not scale.
    """
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale={scale}; expected 0 < lowest <= highest")
    if shortest is not None:
        _check_lengths("shortest", (shortest,))
    low, high = float(scale[0]), float(scale[1])
    plans = (
        functools.partial(random_scale_plan, scale=(low, high), shortest=shortest),
        functools.partial(random_window_plan, window=_pair(crop)),
        _flip(flip),
    )
    return SegmentationTransform(functools.partial(in_turn, plans=plans), color_jitter)


def fixed_size_labels_train(
    size: int | Size, *, flip: float | int = 0.5, color_jitter: float | int = 0.0
) -> SegmentationTransform:
    """Both sides to a fixed length, whatever the shape, and flip."""
    plans = (functools.partial(resize_plan, to=_pair(size)), _flip(flip))
    return SegmentationTransform(functools.partial(in_turn, plans=plans), color_jitter)


def segmentation_eval(shortest: int | None = None, longest: int | None = None) -> SegmentationTransform:
    """The image as it is or, with ``shortest``, its shorter side at that length, the longer at most ``longest``."""
    if shortest is None:
        return SegmentationTransform()
    _check_lengths("shortest", (shortest,))
    plan = functools.partial(shortest_side_plan, shortest=(shortest,), longest=longest, rounding="detectron2")
    return SegmentationTransform(plan)


def fixed_size_labels_eval(size: int | Size) -> SegmentationTransform:
    """Both sides to a fixed length, whatever the shape; nothing random."""
    return SegmentationTransform(functools.partial(resize_plan, to=_pair(size)))


def fit_labels_eval(size: int | Size) -> SegmentationTransform:
    """As large as fits into ``size``, of the same shape; nothing random."""
    return SegmentationTransform(functools.partial(scale_jitter_plan, target=_pair(size), scale=(1.0, 1.0)))


def _flip(probability: float | int) -> Plan:
    if not 0 <= probability <= 1:
        raise ValueError(f"flip={probability}; expected a probability, 0 to 1")
    return functools.partial(random_flip_plan, probability=probability)


def _pair(size: int | Size) -> Size:
    pair = (size, size) if isinstance(size, int) else (size[0], size[1])
    _check_lengths("size", pair)
    return pair


def _check_lengths(name: str, lengths: Sequence[int]) -> None:
    if min(lengths) < 1:
        raise ValueError(f"{name}={lengths}; expected lengths in pixels, 1 or more")
