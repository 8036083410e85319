"""Image transforms on the host: uint8 HWC in, uint8 HWC out; randomness only from the generator that is passed.

Resizing is Pillow's (antialiased), which is what published evaluation numbers were measured with. Turning pixels
into floats (``normalize``) belongs on the device, where it costs nothing.
"""

import difflib
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from eqvision.data.augment import host_augmentations
from eqvision.data.augment.operations import Fill

if TYPE_CHECKING:  # recipes come after data: their type may be named here, their code not imported
    import eqvision.recipes.config

Image = UInt8[np.ndarray, "h w c"]
Resized = UInt8[np.ndarray, "new_h new_w c"]
TrainTransform = Callable[[np.ndarray, np.random.Generator], np.ndarray]
EvalTransform = Callable[[np.ndarray], np.ndarray]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

CROP_SCALE = (0.08, 1.0)  # shares of the area, of Szegedy et al. 2015
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4}  # Pillow's numbers


def normalize(
    images: Num[np.ndarray, "*b h w c"] | Num[Array, "*b h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float[np.ndarray, "*b h w c"] | Float[Array, "*b h w c"]:
    """``(images / 255 - mean) / std`` in float32, for pixels 0..255; numpy stays numpy, jax stays jax.

    Raises ValueError unless mean and std have one value, or one per channel.
    """
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, images.shape[-1]):
            raise ValueError(f"{name} has {len(values)} values but the images have {images.shape[-1]} channels")
    unit = images.astype(np.float32) / np.float32(255)
    return (unit - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


# Size


def resize(image: Image, size: int | tuple[int, int], interpolation: str = "bicubic") -> Resized:
    """To (height, width), or with a single number so that the shorter side has that length (the longer is floored)."""
    filter_number = _filter_number(interpolation)
    height, width = image.shape[:2]
    if isinstance(size, int):
        short = min(height, width)
        size = (size, int(size * width / short)) if height <= width else (int(size * height / short), size)
    if min(size) < 1:
        raise ValueError(f"cannot resize an image of {height}x{width} to {size[0]}x{size[1]}")
    return image if size == (height, width) else _pillow_resize(image, size, filter_number)


def _pillow_resize(image: np.ndarray, size: tuple[int, int], filter_number: int) -> np.ndarray:
    from PIL import Image as pillow

    # Pillow knows grey and RGB; other channel counts go one by one (its 4-channel modes treat one as alpha).
    planes = [image] if image.shape[-1] == 3 else [image[..., c] for c in range(image.shape[-1])]
    resized = [
        np.asarray(pillow.fromarray(np.ascontiguousarray(p)).resize((size[1], size[0]), filter_number)) for p in planes
    ]
    return resized[0] if image.shape[-1] == 3 else np.stack(resized, axis=-1)


def center_crop(image: Image, size: int) -> UInt8[np.ndarray, "{size} {size} c"]:
    """The middle ``size`` x ``size`` pixels. Raises ValueError for a smaller image."""
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise ValueError(f"cannot crop {size}x{size} from an image of {height}x{width}; resize it first")
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


def resize_and_center_crop(
    image: Image, size: int, crop_fraction: float = 0.875, interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "{size} {size} c"]:
    """The usual evaluation: shorter side to ``floor(size / crop_fraction)``, then the middle square."""
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction={crop_fraction}; expected 0 < crop_fraction <= 1")
    return center_crop(resize(image, math.floor(size / crop_fraction), interpolation), size)


# Randomness


def random_resized_crop(
    image: Image,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
) -> UInt8[np.ndarray, "{size} {size} c"]:
    """A random region resized to a square (Szegedy et al. 2015, section 6).

    Its share of the area is uniform in ``scale`` and its width / height log-uniform in ``ratio``; where ten draws do
    not fit into the image, the largest middle region of an allowed ratio.
    """
    top, left, height, width = random_region(image.shape[:2], rng, scale, ratio)
    return resize(image[top : top + height, left : left + width], (size, size), interpolation)


def random_region(
    shape: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    rows, columns = shape
    for _ in range(10):
        area = rows * columns * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < height <= rows and 0 < width <= columns:
            return int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1)), height, width
    aspect = min(max(columns / rows, ratio[0]), ratio[1])
    height, width = min(rows, round(columns / aspect)), min(columns, round(rows * aspect))
    height, width = max(height, 1), max(width, 1)
    return (rows - height) // 2, (columns - width) // 2, height, width


def random_flip(image: Image, rng: np.random.Generator) -> Image:
    """Mirrored left to right with probability one half."""
    return image[:, ::-1] if rng.integers(2) else image


def pad_and_crop(image: Image, rng: np.random.Generator, padding: int, mode: str = "zero") -> Image:
    """Shifted by up to ``padding`` pixels each way: padded ("zero" or "reflect"), then cropped at random."""
    if mode not in ("zero", "reflect"):
        raise ValueError(f"unknown padding mode {mode!r}; expected 'zero' or 'reflect'")
    height, width, channels = image.shape
    if mode == "reflect":
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    else:  # by hand: np.pad would take longer than all else in the transform
        padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), image.dtype)
        padded[padding : padding + height, padding : padding + width] = image
    top, left = rng.integers(2 * padding + 1, size=2)
    return padded[top : top + height, left : left + width]


# The usual recipes


def imagenet_train(
    image: Image, rng: np.random.Generator, size: int, interpolation: str, scale: tuple[float, float] = CROP_SCALE
) -> Resized:
    """Random resized crop and flip."""
    return random_flip(random_resized_crop(image, rng, size, scale, interpolation=interpolation), rng)


def cifar_train(image: Image, rng: np.random.Generator, size: int, interpolation: str) -> Resized:
    """Shifts of up to an eighth of the size (4 pixels at 32) into black, and flip (He et al. 2016, section 4.2)."""
    fitted = resize_and_center_crop(image, size, 1.0, interpolation)
    return random_flip(pad_and_crop(fitted, rng, padding=size // 8), rng)


def digits_train(image: Image, rng: np.random.Generator, size: int, interpolation: str) -> Resized:
    """Shifts of up to an eighth of the size (1 pixel at 8); no flip, which would change the digit."""
    fitted = resize_and_center_crop(image, size, 1.0, interpolation)
    return pad_and_crop(fitted, rng, padding=size // 8)


def plain_train(image: Image, rng: np.random.Generator, size: int, interpolation: str) -> Resized:
    """No augmentation."""
    return resize_and_center_crop(image, size, 1.0, interpolation)


TRAIN_TRANSFORMS = {
    "imagenet": imagenet_train,
    "cifar": cifar_train,
    "digits": digits_train,
    "none": plain_train,
}
EVAL_CROP_FRACTIONS = {"imagenet": 0.875, "cifar": 1.0, "digits": 1.0, "none": 1.0}


def train_transform(
    kind: str,
    size: int,
    interpolation: str = "bicubic",
    augment: "eqvision.recipes.config.AugmentConfig | None" = None,
    fill: Fill = 128,
    crop_scale: tuple[float, float] = CROP_SCALE,
) -> TrainTransform:
    """``(image, rng) -> image`` of ``size`` x ``size``; kinds "imagenet", "cifar", "digits", "none".

    Crop and flip, then what ``augment`` adds on the host: colour jitter, then the policy, which works on the final
    size as in published recipes, so that its cost does not depend on the file. AutoAugment takes the table found on
    CIFAR-10 for the kind "cifar", else ImageNet's. ``fill`` is the level (or one for each channel) that rotation,
    shear and translation leave behind: pass ``mean_fill(mean)``. ``crop_scale`` is for "imagenet": the shares of the
    area between which crops lie. Raises ValueError for unknown names, and for shares and options of ``augment`` out of
    range.
    """
    _check_name("transform", kind, TRAIN_TRANSFORMS)
    _filter_number(interpolation)
    check_crop_scale(crop_scale)
    crop = functools.partial(TRAIN_TRANSFORMS[kind], size=size, interpolation=interpolation)
    if kind == "imagenet":
        crop = functools.partial(crop, scale=crop_scale)
    if augment is None:
        return crop
    table = "cifar" if kind == "cifar" else "imagenet"
    added = host_augmentations(augment, table=table, interpolation=interpolation, fill=fill)
    return functools.partial(_in_turn, steps=(crop, *added)) if added else crop


def check_crop_scale(scale: tuple[float, float]) -> None:
    """Raise ValueError unless the shares rise and lie in (0, 1]."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(
            f"data.crop_scale {scale[0]:g} {scale[1]:g}: expected the least and the largest share of an image's area, "
            "0 < least <= largest <= 1, such as 0.2 1"
        )


def _in_turn(image: np.ndarray, rng: np.random.Generator, steps: Sequence[TrainTransform]) -> np.ndarray:
    for step in steps:
        image = step(image, rng)
    return image


def eval_transform(
    kind: str, size: int, interpolation: str = "bicubic", crop_fraction: float | None = None
) -> EvalTransform:
    """``image -> image`` of ``size`` x ``size``: resize and central crop, by default 0.875 for "imagenet", 1 else.

    ``crop_fraction`` 0 resizes both sides to ``size``, whatever the shape, and cuts nothing.
    """
    _check_name("transform", kind, EVAL_CROP_FRACTIONS)
    _filter_number(interpolation)
    fraction = EVAL_CROP_FRACTIONS[kind] if crop_fraction is None else crop_fraction
    if fraction == 0:
        return functools.partial(resize, size=(size, size), interpolation=interpolation)
    return functools.partial(resize_and_center_crop, size=size, crop_fraction=fraction, interpolation=interpolation)


def _filter_number(interpolation: str) -> int:
    _check_name("interpolation", interpolation, INTERPOLATIONS)
    return INTERPOLATIONS[interpolation]


def _check_name(what: str, name: str, table: dict) -> None:
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown {what} {name!r}{hint} Valid: {', '.join(sorted(table))}")
