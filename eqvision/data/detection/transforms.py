"""Detection transforms on the host: ``transform(example, rng) -> example`` in numpy and Pillow.

Image, boxes and masks move alike; boxes are cut to the image, and objects without area left are dropped. Images stay
uint8: ``normalize_padded`` makes floats of them on the device.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from eqvision.data.augment import color_jitter
from eqvision.data.detection.annotations import DetectionExample
from eqvision.data.detection.moves import (
    Plan,
    either,
    in_turn,
    move_example,
    no_moves,
    random_crop_plan,
    random_flip_plan,
    resize_plan,
    scale_jitter_plan,
    shifted_region_plan,
    shortest_side_plan,
    size_after,
)
from eqvision.data.detection.sizes import ROUNDINGS, Size
from eqvision.data.transforms import INTERPOLATIONS
from eqvision.names import nearest

DETR_SCALES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
CENTERNET_SCALES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)


@runtime_checkable
class Transform(Protocol):
    """What streams apply. All randomness comes from ``rng``."""

    def __call__(self, example: DetectionExample, rng: np.random.Generator) -> DetectionExample: ...


@runtime_checkable
class PlannedTransform(Protocol):
    """A transform that tells the size of its result without the pixels, which buckets of several sizes need."""

    def __call__(self, example: DetectionExample, rng: np.random.Generator) -> DetectionExample: ...

    def output_size(self, size: Size, rng: np.random.Generator) -> Size: ...


@dataclass(frozen=True)
class DetectionTransform:
    """The moves that ``plan`` draws from the size of the image, then colour jitter; objects left without area go.

    ``color_jitter`` is the strength of brightness, contrast and saturation changes, 0 for none.
    ``boxes_from_masks``: boxes are made anew around what is left of each mask, and objects without a pixel go (as
    with large-scale jitter); raises ValueError for an example without masks. ``interpolation`` is Pillow's. Raises
    UnknownNameError for another interpolation, ValueError for a strength outside 0..1.
    """

    plan: Plan = no_moves
    color_jitter: float | int = 0.0
    boxes_from_masks: bool = False
    interpolation: str = "bilinear"

    def __post_init__(self):
        if self.interpolation not in INTERPOLATIONS:
            raise nearest(self.interpolation, list(INTERPOLATIONS), "interpolation")
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter={self.color_jitter}; expected 0 (none) to 1")

    def output_size(self, size: Size, rng: np.random.Generator) -> Size:
        """Height and width that ``self(example, rng)`` gives an image of ``size``, for a generator in that state."""
        return size_after(size, self.plan(size, rng))

    def __call__(self, example: DetectionExample, rng: np.random.Generator) -> DetectionExample:
        height, width = example.image.shape[:2]
        # The plan draws first: output_size has no pixels and must see the same numbers.
        example = move_example(example, self.plan((height, width), rng), self.interpolation)
        if self.color_jitter:
            example = example._replace(image=color_jitter(example.image, rng, self.color_jitter))
        return clipped(with_boxes_from_masks(example) if self.boxes_from_masks else example)


def clipped(example: DetectionExample) -> DetectionExample:
    """Boxes cut to the image; objects whose box has no area left are dropped."""
    height, width = example.image.shape[:2]
    boxes = np.clip(example.boxes, 0, np.array([width, height] * 2, np.float32))
    return keep_objects(example._replace(boxes=boxes), (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))


def with_boxes_from_masks(example: DetectionExample) -> DetectionExample:
    """Boxes around what each mask covers; objects whose mask has no pixel are dropped. Raises ValueError: no masks."""
    if example.masks is None:
        raise ValueError("boxes_from_masks needs masks, and the example has none: open the source with masks")
    example = keep_objects(example, np.asarray(example.masks.any(axis=(1, 2))))
    assert example.masks is not None
    return example._replace(boxes=mask_boxes(example.masks))


def mask_boxes(masks: UInt8[np.ndarray, "g h w"]) -> Float32[np.ndarray, "g 4"]:
    """The smallest xyxy box around each mask; zeros for a mask without a pixel."""
    spans = [_span(np.asarray(masks.any(axis=axis))) for axis in (1, 2)]
    (x1, x2), (y1, y2) = spans
    return np.stack([x1, y1, x2, y2], axis=1).astype(np.float32)


def _span(covered: Bool[np.ndarray, "g n"]) -> tuple[np.ndarray, np.ndarray]:
    first = covered.argmax(axis=1)
    end = covered.shape[1] - covered[:, ::-1].argmax(axis=1)
    return first, np.where(covered.any(axis=1), end, 0)


def keep_objects(example: DetectionExample, chosen: np.ndarray) -> DetectionExample:
    """Only these objects: one bool for each, or their positions."""
    masks = None if example.masks is None else example.masks[chosen]
    return example._replace(boxes=example.boxes[chosen], labels=example.labels[chosen], masks=masks)


# The usual recipes


def detr_train(
    *,
    scales: Sequence[int] = DETR_SCALES,
    longest: int | None = 1333,
    crop_scales: Sequence[int] = (400, 500, 600),
    crop: tuple[int, int] = (384, 600),
    crop_probability: float | int = 0.5,
    flip: float | int = 0.5,
    color_jitter: float | int = 0.0,
    boxes_from_masks: bool = False,
    rounding: str = "detr",
) -> DetectionTransform:
    """Flip; then the shorter side to one of ``scales``, in half of the cases after a random crop (DETR, section A.4).

    The crop is taken from an image whose shorter side is one of ``crop_scales``; its sides are even in ``crop``.
    The defaults are those of DETR and Deformable DETR on COCO; ``crop_probability`` 0 is plain multi-scale training.
    """
    _check_lengths("scales", scales)
    _check_lengths("crop_scales", crop_scales)
    _check_lengths("crop", crop)
    _check_probability("crop_probability", crop_probability)
    multi_scale = _shortest(scales, longest, rounding)
    region = functools.partial(random_crop_plan, smallest=crop[0], largest=crop[1])
    cropped = functools.partial(in_turn, plans=(_shortest(crop_scales, None, rounding), region, multi_scale))
    chosen = functools.partial(either, first=cropped, second=multi_scale, probability=crop_probability)
    plan = functools.partial(in_turn, plans=(_flip(flip), chosen))
    return DetectionTransform(plan, color_jitter, boxes_from_masks)


def large_scale_jitter(
    size: int | Size = 1024,
    *,
    scale: tuple[float, float] = (0.1, 2.0),
    flip: float | int = 0.5,
    color_jitter: float | int = 0.0,
    boxes_from_masks: bool = False,
) -> DetectionTransform:
    """Resized to ``scale`` times ``size``, cut to ``size`` where larger, and flip (Ghiasi et al. 2021, section 3).

    What is smaller is padded by the stream, whose bucket should be ``size``. Published recipes set
    ``boxes_from_masks``.
    """
    target = _pair(size)
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale={scale}; expected 0 < lowest <= highest")
    jitter = functools.partial(scale_jitter_plan, target=target, scale=scale)
    return DetectionTransform(
        functools.partial(in_turn, plans=(jitter, _flip(flip))), color_jitter, boxes_from_masks=boxes_from_masks
    )


def fixed_size_train(
    size: int | Size, *, flip: float | int = 0.5, color_jitter: float | int = 0.0
) -> DetectionTransform:
    """Both sides to a fixed length, whatever the shape, and flip."""
    plans = (functools.partial(resize_plan, to=_pair(size)), _flip(flip))
    return DetectionTransform(functools.partial(in_turn, plans=plans), color_jitter)


def random_crop_train(
    size: int | Size,
    *,
    crop: tuple[int, int],
    crop_probability: float | int = 0.5,
    flip: float | int = 0.5,
    color_jitter: float | int = 0.0,
) -> DetectionTransform:
    """A random region with sides even in ``crop``, or the whole, to a fixed height and width; and flip."""
    _check_lengths("crop", crop)
    _check_probability("crop_probability", crop_probability)
    region = functools.partial(random_crop_plan, smallest=crop[0], largest=crop[1])
    chosen = functools.partial(either, first=region, second=no_moves, probability=crop_probability)
    plans = (chosen, functools.partial(resize_plan, to=_pair(size)), _flip(flip))
    return DetectionTransform(functools.partial(in_turn, plans=plans), color_jitter)


def shifted_crop_train(
    size: int | Size,
    *,
    scales: Sequence[float] = CENTERNET_SCALES,
    border: int = 128,
    flip: float | int = 0.5,
    color_jitter: float | int = 0.0,
) -> DetectionTransform:
    """A square region around a random point at a fixed size, and flip: what CenterNet is trained with.

    ``scales`` are sides of the region as shares of the image's longer side, so that objects appear 1 / scale times as
    large: 0.77 to 1.67 times with the defaults. The point lies ``border`` pixels or more within the image. Two things
    differ from the published code: where the region reaches over the upper or left edge, the image is moved to the
    corner of the batch's image and not padded there; and there is no PCA lighting. Evaluate with ``fit_eval``.
    """
    if not scales or min(scales) <= 0 or border < 0:
        raise ValueError(f"scales={scales}, border={border}; expected shares above 0 and pixels, 0 or more")
    region = functools.partial(shifted_region_plan, target=_pair(size), scales=tuple(scales), border=border)
    return DetectionTransform(functools.partial(in_turn, plans=(region, _flip(flip))), color_jitter)


def detection_eval(shortest: int = 800, longest: int | None = 1333, *, rounding: str = "detr") -> DetectionTransform:
    """The shorter side to ``shortest``, the longer to at most ``longest``; nothing random."""
    return DetectionTransform(_shortest((shortest,), longest, rounding))


def fixed_size_eval(size: int | Size) -> DetectionTransform:
    """Both sides to a fixed length, whatever the shape; nothing random."""
    return DetectionTransform(functools.partial(resize_plan, to=_pair(size)))


def fit_eval(size: int | Size) -> DetectionTransform:
    """As large as fits into ``size``, of the same shape: what large-scale jitter is evaluated with. Nothing random."""
    return DetectionTransform(functools.partial(scale_jitter_plan, target=_pair(size), scale=(1.0, 1.0)))


def _shortest(shortest: Sequence[int], longest: int | None, rounding: str) -> Plan:
    _check_lengths("shortest", shortest)
    if rounding not in ROUNDINGS:
        raise nearest(rounding, list(ROUNDINGS), "rounding of sizes")
    return functools.partial(shortest_side_plan, shortest=tuple(shortest), longest=longest, rounding=rounding)


def _flip(probability: float | int) -> Plan:
    _check_probability("flip", probability)
    return functools.partial(random_flip_plan, probability=probability)


def _pair(size: int | Size) -> Size:
    pair = (size, size) if isinstance(size, int) else size
    _check_lengths("size", pair)
    return pair


def _check_lengths(name: str, lengths: Sequence[int]) -> None:
    if not lengths or min(lengths) < 1:
        raise ValueError(f"{name}={lengths}; expected lengths in pixels, 1 or more")


def _check_probability(name: str, probability: float | int) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"{name}={probability}; expected a probability, 0 to 1")
