"""Embedded demo: scenes of real handwritten digits, composed on the fly, with exact boxes and masks."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64, UInt8

from eqvision.data.detection.annotations import Annotations, DetectionExample
from eqvision.data.detection.rle import encode_uncompressed
from eqvision.data.detection.sizes import Size
from eqvision.data.detection.transforms import keep_objects, mask_boxes
from eqvision.data.sources import Arrays, digits
from eqvision.data.transforms import resize

SPLITS = {"train": 0, "test": 1}
_INK = 0.25  # opacity from which a pixel belongs to the digit; what is fainter is not drawn at all
_OVERLAP = 0.2  # of the smaller of two boxes, at most
_TRIES = 20  # places looked at for one digit, before it is left out


class _Digit(NamedTuple):
    """A digit to be drawn at (top, left): opacity 0..1, 0 or at least ``_INK``."""

    opacity: Float32[np.ndarray, "h w"]
    label: int
    top: int
    left: int


class DigitScenes:
    """Scenes of 1 to ``max_digits`` digits on a noisy background; a pure function of (seed, split, index).

    The digits are scikit-learn's real 8x8 images, those of the training split in "train" and the others in "test", so
    that the two have no digit image in common. They are scaled to sides even in ``digit_size`` (pixels, of the 8x8
    image with its margin), brighter than what is behind them, and placed so that two boxes share at most a fifth of
    the smaller one; later ones hide earlier ones. A digit for which no place is found is left out. Masks are what can
    be seen of each digit, to the pixel, and boxes lie tightly around them. ``size`` is that of the canvas (height,
    width, or one number for a square), ``channels`` 1 or 3, ``length`` the number of scenes, by default 4096 for
    training and 256 for testing. Raises ValueError for values that do not fit, ImportError without scikit-learn.
    """

    class_names = tuple("0123456789")
    category_ids = tuple(range(10))
    num_skipped = 0

    def __init__(
        self,
        split: str,
        *,
        size: int | Size = 96,
        channels: int = 3,
        max_digits: int = 6,
        digit_size: tuple[int, int] = (16, 40),
        length: int | None = None,
        masks: bool = True,
        seed: int = 0,
    ):
        if split not in SPLITS:
            raise ValueError(f"digit scenes have the splits 'train' and 'test', got {split!r}")
        self.size = (size, size) if isinstance(size, int) else size
        if not 4 <= digit_size[0] <= digit_size[1] <= min(self.size):
            raise ValueError(f"digit_size={digit_size}; expected 4 <= smallest <= largest <= {min(self.size)} (canvas)")
        if channels not in (1, 3) or max_digits < 1 or seed < 0:
            raise ValueError(
                f"channels={channels}, max_digits={max_digits}, seed={seed}; expected channels 1 or 3, max_digits 1 or "
                "more, seed 0 or more"
            )
        self.split, self.channels, self.max_digits, self.digit_size = split, channels, max_digits, digit_size
        self.masks, self.seed = masks, seed
        self._length = {"train": 4096, "test": 256}[split] if length is None else length
        self._digits: Arrays = digits(split)

    @property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """The canvas, for each scene."""
        return np.tile(np.array(self.size, np.int32), (len(self), 1))

    @property
    def image_ids(self) -> Int64[np.ndarray, " n"]:
        """The place in the source."""
        return np.arange(len(self), dtype=np.int64)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> DetectionExample:
        index = range(len(self))[index]
        example = self._composed(index)
        return example if self.masks else example._replace(masks=None)

    def annotations(self, index: int) -> Annotations:
        """What evaluation compares with: the objects of a scene, ``area`` that of the mask, no crowd."""
        index = range(len(self))[index]
        example = self._composed(index)
        masks = example.masks
        assert masks is not None
        return Annotations(
            boxes=example.boxes,
            labels=example.labels,
            area=masks.sum(axis=(1, 2)).astype(np.float64),
            iscrowd=np.zeros(len(masks), bool),
            ids=index * self.max_digits + np.arange(len(masks), dtype=np.int64) + 1,  # COCO tools take 0 for none
            segmentations=tuple(map(encode_uncompressed, masks)) if self.masks else (None,) * len(masks),
        )

    def truth(self, index: int) -> Annotations:
        """What evaluation compares with: nothing was cut off here, so the same as ``annotations``."""
        return self.annotations(index)

    def truth_masks(self, index: int) -> Iterator[dict[str, Any]]:
        """The masks of ``truth`` in its order, as run lengths that ``CocoMetric`` takes; with ``masks=False`` too."""
        for mask in self._masks(range(len(self))[index]):
            code = encode_uncompressed(mask)
            yield {"size": list(code.size), "counts": code.counts.tolist()}

    def _masks(self, index: int) -> UInt8[np.ndarray, "g h w"]:
        masks = self._composed(index).masks
        assert masks is not None
        return masks

    def describe(self, index: int) -> str:
        """Number of the scene and what it was made from."""
        return f"scene {index} of digit scenes/{self.split} (seed {self.seed})"

    def _composed(self, index: int) -> DetectionExample:
        rng = np.random.default_rng([self.seed, SPLITS[self.split], index])
        chosen = self._placed(rng)
        image, masks = _drawn(_background(rng, self.size, self.channels), chosen, rng)
        labels = np.array([digit.label for digit in chosen], np.int32)
        size = self.size
        example = DetectionExample(image, np.zeros((len(labels), 4), np.float32), labels, masks, index, index, size)
        # A digit can be hidden by several others together.
        example = keep_objects(example, np.asarray(masks.any(axis=(1, 2))))
        assert example.masks is not None
        return example._replace(boxes=mask_boxes(example.masks))

    def _placed(self, rng: np.random.Generator) -> list[_Digit]:
        placed: list[_Digit] = []
        boxes: list[np.ndarray] = []
        for _ in range(int(rng.integers(1, self.max_digits + 1))):
            number = int(rng.integers(len(self._digits)))
            opacity = _opacity(self._digits.images[number], rng, self.digit_size)
            tight = mask_boxes((opacity > 0)[None].astype(np.uint8))[0]
            for _ in range(_TRIES):
                top, left = (int(rng.integers(s - o + 1)) for s, o in zip(self.size, opacity.shape, strict=True))
                box = tight + np.array([left, top] * 2, np.float32)
                if all(_shared(box, other) <= _OVERLAP for other in boxes):
                    placed.append(_Digit(opacity, int(self._digits.labels[number]), top, left))
                    boxes.append(box)
                    break
        return placed


def _opacity(digit: np.ndarray, rng: np.random.Generator, sides: tuple[int, int]) -> Float32[np.ndarray, "h w"]:
    """The 8x8 digit scaled to a random size and, by up to a fifth, another shape."""
    side = int(rng.integers(sides[0], sides[1] + 1))
    other = min(sides[1], max(4, round(side * rng.uniform(0.8, 1.0))))
    shape = (side, other) if rng.random() < 0.7 else (other, side)
    opacity = resize(digit, shape, "bicubic")[..., 0].astype(np.float32) / 255
    return np.where(opacity >= _INK, opacity, np.float32(0))


def _shared(box: np.ndarray, other: np.ndarray) -> float:
    """The area that two boxes share, as a part of the smaller one."""
    width, height = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return float(max(width, 0) * max(height, 0) / min(areas))


def _background(rng: np.random.Generator, size: Size, channels: int) -> Float[np.ndarray, "h w c"]:
    """A dark colour that changes evenly from one side to the other, with noise in every pixel."""
    corner, slope = rng.uniform(20, 90, channels), rng.uniform(-30, 30, (2, channels))
    rows, columns = (np.linspace(0, 1, side)[:, None] for side in size)
    plain = corner + (rows * slope[0])[:, None] + (columns * slope[1])[None]
    return plain + rng.normal(0, rng.uniform(2, 15), (*size, channels))


def _drawn(
    canvas: Float[np.ndarray, "h w c"], chosen: Sequence[_Digit], rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "h w c"], UInt8[np.ndarray, "g h w"]]:
    """The digits on the canvas one after the other, and what can be seen of each."""
    masks = np.zeros((len(chosen), *canvas.shape[:2]), np.uint8)
    for number, digit in enumerate(chosen):
        height, width = digit.opacity.shape
        region = (slice(digit.top, digit.top + height), slice(digit.left, digit.left + width))
        colour, opacity = rng.uniform(150, 255, canvas.shape[2]), digit.opacity[..., None]
        canvas[region] = canvas[region] * (1 - opacity) + colour * opacity
        masks[(slice(None), *region)] &= (digit.opacity == 0).astype(np.uint8)  # hides the earlier ones
        masks[(number, *region)] = digit.opacity > 0
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8), masks
