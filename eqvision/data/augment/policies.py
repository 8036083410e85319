"""Policies: which operations an image gets. uint8 HWC in and out, grey or RGB; randomness only from the generator.

Pixels that rotation, shear and translation uncover get ``fill``; pass the mean colour of the data (``mean_fill``), so
that they are zero after ``normalize``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from eqvision.data.augment.operations import OPERATIONS, Canvas, Fill, Image, from_pillow, make_canvas, to_pillow
from eqvision.data.augment.tables import AUTOAUGMENT_TABLES, RANDAUGMENT, TRIVIALAUGMENT, Range
from eqvision.names import nearest

if TYPE_CHECKING:
    import PIL.Image

_RANDAUGMENT, _TRIVIALAUGMENT = tuple(RANDAUGMENT), tuple(TRIVIALAUGMENT)


def mean_fill(mean: Sequence[float]) -> tuple[int, ...]:
    """The mean colour in 0..1 as grey levels 0..255."""
    return tuple(min(255, max(0, round(255 * value))) for value in mean)


def randaugment(
    image: Image,
    rng: np.random.Generator,
    num_ops: int = 2,
    magnitude: float = 9.0,
    magnitude_std: float = 0.0,
    interpolation: str = "bicubic",
    fill: Fill = 128,
) -> Image:
    """``num_ops`` times, one of 15 operations, drawn evenly and applied with probability one half.

    RandAugment (Cubuk et al. 2020) as timm's ``rand-m9-mstd0.5-inc1``: "increasing" values (stronger with the
    magnitude, ``tables.RANDAUGMENT``), the magnitude normal with ``magnitude_std`` and clipped to 0..10. The paper
    itself applies every draw and has identity among its 14 operations.
    """
    canvas = make_canvas(interpolation, fill)
    picture = to_pillow(image)
    for number in rng.integers(len(_RANDAUGMENT), size=num_ops):
        if rng.random() < 0.5:
            strength = magnitude + magnitude_std * rng.standard_normal()
            name = _RANDAUGMENT[number]
            picture = _apply(picture, rng, name, RANDAUGMENT[name], min(max(strength, 0.0), 10.0) / 10, canvas)
    return from_pillow(picture)


def trivialaugment(image: Image, rng: np.random.Generator, interpolation: str = "bicubic", fill: Fill = 128) -> Image:
    """One of 14 operations with a strength drawn evenly from 31 (Mueller & Hutter 2021, the wide space)."""
    canvas = make_canvas(interpolation, fill)
    name = _TRIVIALAUGMENT[rng.integers(len(_TRIVIALAUGMENT))]
    strength = int(rng.integers(31)) / 30
    if name == "identity":
        return image
    return from_pillow(_apply(to_pillow(image), rng, name, TRIVIALAUGMENT[name], strength, canvas))


def autoaugment(
    image: Image,
    rng: np.random.Generator,
    table: str = "imagenet",
    interpolation: str = "bicubic",
    fill: Fill = 128,
) -> Image:
    """One of 25 pairs of operations, each with its own probability and strength (Cubuk et al. 2019).

    ``table`` "imagenet" is EfficientNet's v0 as in timm, "cifar" the paper's for CIFAR-10. Raises UnknownNameError
    for another.
    """
    if table not in AUTOAUGMENT_TABLES:
        raise nearest(table, list(AUTOAUGMENT_TABLES), "AutoAugment table")
    pairs, ranges = AUTOAUGMENT_TABLES[table]
    canvas = make_canvas(interpolation, fill)
    picture = to_pillow(image)
    for name, probability, strength in pairs[rng.integers(len(pairs))]:
        if rng.random() < probability:
            picture = _apply(picture, rng, name, ranges[name], strength / 10, canvas)
    return from_pillow(picture)


def three_augment(image: Image, rng: np.random.Generator, color_jitter: float = 0.3) -> Image:
    """Grey, solarised from 128 up, or blurred (0.1 to 2 pixels), drawn evenly; then colour jitter.

    3-Augment of DeiT III (Touvron et al. 2022, section 3), which jitters by 0.3.
    """
    name = ("grayscale", "solarize", "gaussian_blur")[rng.integers(3)]
    value = rng.uniform(0.1, 2.0) if name == "gaussian_blur" else 128.0
    picture = OPERATIONS[name](to_pillow(image), value, Canvas())
    return from_pillow(_jitter(picture, rng, color_jitter))


def color_jitter(image: Image, rng: np.random.Generator, strength: float) -> Image:
    """Brightness, contrast and saturation, in random order, each times a factor even in ``1 +- strength``."""
    return from_pillow(_jitter(to_pillow(image), rng, strength))


def _jitter(picture: "PIL.Image.Image", rng: np.random.Generator, strength: float) -> "PIL.Image.Image":
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=3)
    for number in rng.permutation(3):
        name = ("brightness", "contrast", "color")[number]
        picture = OPERATIONS[name](picture, float(factors[number]), Canvas())
    return picture


def _apply(
    picture: "PIL.Image.Image", rng: np.random.Generator, name: str, span: Range, strength: float, canvas: Canvas
) -> "PIL.Image.Image":
    return OPERATIONS[name](picture, value_of(span, strength, rng), canvas)


def value_of(span: Range, strength: float, rng: np.random.Generator) -> float:
    """The value of an operation at a strength in 0..1; the generator is asked for signed ranges only."""
    # Rounded first: 10 * 0.3 of a strength that was divided before must not fall below the whole number.
    change = int(round(span.change * strength, 9)) if span.whole else span.change * strength
    if span.signed and rng.random() < 0.5:
        change = -change
    return float(span.start + change)
