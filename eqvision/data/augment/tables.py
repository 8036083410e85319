"""The numbers of the published policies: which operations, how strong, how likely."""

from typing import NamedTuple


class Range(NamedTuple):
    """How a strength s in 0..1 becomes the value of an operation: ``start + change * s``.

    ``whole`` truncates the change towards zero; ``signed`` turns its sign with probability one half.
    """

    start: float = 0.0
    change: float = 0.0
    signed: bool = False
    whole: bool = False


Ranges = dict[str, Range]
SubPolicy = tuple[tuple[str, float, int], tuple[str, float, int]]  # twice: operation, probability, strength 0..10

_GEOMETRY: Ranges = {
    "rotate": Range(0, 30, signed=True),
    "shear_x": Range(0, 0.3, signed=True),
    "shear_y": Range(0, 0.3, signed=True),
    "translate_x_rel": Range(0, 0.45, signed=True),
    "translate_y_rel": Range(0, 0.45, signed=True),
}

# timm's "increasing" space (the inc1 of rand-m9-mstd0.5-inc1): strength 0 changes nothing but for posterize, which
# goes from 4 bits down to 0, and the operations without a value.
RANDAUGMENT: Ranges = {
    "auto_contrast": Range(),
    "equalize": Range(),
    "invert": Range(),
    **_GEOMETRY,
    "posterize": Range(4, -4, whole=True),
    "solarize": Range(256, -256, whole=True),
    "solarize_add": Range(0, 110, whole=True),
    "color": Range(1, 0.9, signed=True),
    "contrast": Range(1, 0.9, signed=True),
    "brightness": Range(1, 0.9, signed=True),
    "sharpness": Range(1, 0.9, signed=True),
}

# The wide space of Mueller & Hutter 2021: 14 operations, strengths 0/30 to 30/30, translation in pixels.
TRIVIALAUGMENT: Ranges = {
    "identity": Range(),
    "auto_contrast": Range(),
    "equalize": Range(),
    "rotate": Range(0, 135, signed=True, whole=True),
    "solarize": Range(256, -256, whole=True),
    "color": Range(0.01, 1.99),
    "posterize": Range(8, -6, whole=True),
    "contrast": Range(0.01, 1.99),
    "brightness": Range(0.01, 1.99),
    "sharpness": Range(0.01, 1.99),
    "shear_x": Range(0, 0.99, signed=True),
    "shear_y": Range(0, 0.99, signed=True),
    "translate_x": Range(0, 32, signed=True, whole=True),
    "translate_y": Range(0, 32, signed=True, whole=True),
}

# EfficientNet's, as timm has them: here posterize and solarize become weaker with the strength.
AUTOAUGMENT_IMAGENET_RANGES: Ranges = {
    "auto_contrast": Range(),
    "equalize": Range(),
    "invert": Range(),
    **_GEOMETRY,
    "posterize": Range(0, 4, whole=True),
    "solarize": Range(0, 256, whole=True),
    "solarize_add": Range(0, 110, whole=True),
    "color": Range(0.1, 1.8),
}

# EfficientNet's 25 pairs, known as v0 (tensorflow/tpu, timm); the paper prints other ones. Posterize with strength 2
# keeps no bits: that image is black.
AUTOAUGMENT_IMAGENET: tuple[SubPolicy, ...] = (
    (("equalize", 0.8, 1), ("shear_y", 0.8, 4)),
    (("color", 0.4, 9), ("equalize", 0.6, 3)),
    (("color", 0.4, 1), ("rotate", 0.6, 8)),
    (("solarize", 0.8, 3), ("equalize", 0.4, 7)),
    (("solarize", 0.4, 2), ("solarize", 0.6, 2)),
    (("color", 0.2, 0), ("equalize", 0.8, 8)),
    (("equalize", 0.4, 8), ("solarize_add", 0.8, 3)),
    (("shear_x", 0.2, 9), ("rotate", 0.6, 8)),
    (("color", 0.6, 1), ("equalize", 1.0, 2)),
    (("invert", 0.4, 9), ("rotate", 0.6, 0)),
    (("equalize", 1.0, 9), ("shear_y", 0.6, 3)),
    (("color", 0.4, 7), ("equalize", 0.6, 0)),
    (("posterize", 0.4, 6), ("auto_contrast", 0.4, 7)),
    (("solarize", 0.6, 8), ("color", 0.6, 9)),
    (("solarize", 0.2, 4), ("rotate", 0.8, 9)),
    (("rotate", 1.0, 7), ("translate_y_rel", 0.8, 9)),
    (("shear_x", 0.0, 0), ("solarize", 0.8, 4)),
    (("shear_y", 0.8, 0), ("color", 0.6, 4)),
    (("color", 1.0, 0), ("rotate", 0.6, 2)),
    (("equalize", 0.8, 4), ("equalize", 0.0, 8)),
    (("equalize", 1.0, 4), ("auto_contrast", 0.6, 2)),
    (("shear_y", 0.4, 7), ("solarize_add", 0.6, 7)),
    (("posterize", 0.8, 2), ("solarize", 0.6, 10)),
    (("solarize", 0.6, 8), ("equalize", 0.6, 1)),
    (("color", 0.8, 6), ("rotate", 0.4, 5)),
)

# The ranges of Cubuk et al. 2019, appendix, with translation as a share of their 331 pixels.
AUTOAUGMENT_CIFAR_RANGES: Ranges = {
    "auto_contrast": Range(),
    "equalize": Range(),
    "invert": Range(),
    "rotate": Range(0, 30, signed=True),
    "shear_y": Range(0, 0.3, signed=True),
    "translate_x_rel": Range(0, 150 / 331, signed=True),
    "translate_y_rel": Range(0, 150 / 331, signed=True),
    "posterize": Range(8, -4, whole=True),
    "solarize": Range(256, -256, whole=True),
    "color": Range(0.1, 1.8),
    "contrast": Range(0.1, 1.8),
    "brightness": Range(0.1, 1.8),
    "sharpness": Range(0.1, 1.8),
}

# Cubuk et al. 2019, appendix: the 25 pairs found on reduced CIFAR-10; 0 stands where an operation has no strength.
AUTOAUGMENT_CIFAR: tuple[SubPolicy, ...] = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x_rel", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y_rel", 0.7, 9)),
    (("auto_contrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x_rel", 0.5, 8)),
    (("equalize", 0.3, 0), ("auto_contrast", 0.4, 0)),
    (("translate_y_rel", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("auto_contrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("auto_contrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("auto_contrast", 0.9, 0)),
    (("translate_y_rel", 0.9, 9), ("translate_y_rel", 0.7, 9)),
    (("auto_contrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y_rel", 0.7, 9), ("auto_contrast", 0.9, 0)),
)
AUTOAUGMENT_TABLES = {
    "imagenet": (AUTOAUGMENT_IMAGENET, AUTOAUGMENT_IMAGENET_RANGES),
    "cifar": (AUTOAUGMENT_CIFAR, AUTOAUGMENT_CIFAR_RANGES),
}
