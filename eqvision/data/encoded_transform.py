"""Training transforms that start from the encoded image, so that no more is decoded, copied or resized than they use.

A transform of pixels needs all of them as an array, though a random crop throws most away. Here decoding, crop and
flip are one function, for Pillow with the very same pixels, and for simplejpeg and OpenCV with nearly the same.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from eqvision.data.augment import host_augmentations
from eqvision.data.augment.operations import Fill
from eqvision.data.decode import check_in_channels, open_upright, to_pixels
from eqvision.data.fast_decode import fast_decode, fast_imagenet_train, fast_libraries
from eqvision.data.transforms import CROP_SCALE, INTERPOLATIONS, TrainTransform, random_region, train_transform
from eqvision.names import nearest

if TYPE_CHECKING:  # recipes come after data: their type may be named here, their code not imported
    import eqvision.recipes.config

DECODERS = ("pillow", "fast")
# (encoded image, its name for messages, random numbers) -> pixels
ReadImage = Callable[[bytes, str, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class EncodedTransform:
    """A training transform that ``train_stream`` hands encoded images, where the source has them.

    On pixels (arrays, and the black stand-ins of corrupt images) it is ``on_pixels``. On encoded images it is
    ``read``, then every step of ``rest``.
    """

    on_pixels: TrainTransform
    read: ReadImage
    rest: tuple[TrainTransform, ...]
    decoder: str

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self.on_pixels(image, rng)

    def from_encoded(self, data: bytes, name: str, rng: np.random.Generator) -> np.ndarray:
        """The training image of an encoded one. Raises CorruptImageError, which calls it ``name``."""
        image = self.read(data, name, rng)
        for step in self.rest:
            image = step(image, rng)
        return image


def encoded_train_transform(
    kind: str,
    size: int,
    interpolation: str = "bicubic",
    augment: "eqvision.recipes.config.AugmentConfig | None" = None,
    fill: Fill = 128,
    *,
    decoder: str = "pillow",
    in_channels: int = 3,
    crop_scale: tuple[float, float] = CROP_SCALE,
) -> TrainTransform:
    """``train_transform`` with the same arguments, from encoded images; ``decoder`` is "pillow" or "fast".

    "imagenet" crops as it decodes. The other kinds use all pixels: for them "pillow" is ``train_transform`` itself,
    and "fast" decodes faster. Raises ImportError where the extra ``[fast]`` is missing, UnknownNameError for the
    decoder, and what ``train_transform`` raises.
    """
    if decoder not in DECODERS:
        raise nearest(decoder, list(DECODERS), "data.decoder")
    check_in_channels(in_channels)
    if decoder == "fast":
        fast_libraries()  # missing ones are noticed now, not in a thread
    on_pixels = train_transform(kind, size, interpolation, augment, fill, crop_scale)
    if kind != "imagenet":
        whole = functools.partial(_read_whole, in_channels=in_channels)
        return on_pixels if decoder == "pillow" else EncodedTransform(on_pixels, whole, (on_pixels,), decoder)
    crop = fast_imagenet_train if decoder == "fast" else pillow_imagenet_train
    read = functools.partial(crop, size=size, interpolation=interpolation, in_channels=in_channels, scale=crop_scale)
    rest = () if augment is None else host_augmentations(augment, interpolation=interpolation, fill=fill)
    return EncodedTransform(on_pixels, read, rest, decoder)


def pillow_imagenet_train(
    data: bytes,
    name: str,
    rng: np.random.Generator,
    size: int,
    interpolation: str,
    in_channels: int = 3,
    scale: tuple[float, float] = CROP_SCALE,
) -> UInt8[np.ndarray, "{size} {size} {in_channels}"]:
    """``imagenet_train`` of an encoded image, bit for bit, without the arrays in between.

    Raises CorruptImageError as ``decode_bytes`` does.
    """
    from PIL import Image

    image = open_upright(data, in_channels, name=name)
    top, left, height, width = random_region((image.height, image.width), rng, scale)
    crop = image.crop((left, top, left + width, top + height)).resize((size, size), INTERPOLATIONS[interpolation])
    return to_pixels(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.integers(2) else crop)


def _read_whole(data: bytes, name: str, rng: np.random.Generator, in_channels: int) -> np.ndarray:
    return fast_decode(data, in_channels, name=name)
