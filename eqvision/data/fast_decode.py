"""Encoded training images -> pixels by simplejpeg and OpenCV: the same crops and flips as Pillow's, other rounding.

Pixels differ from Pillow's by about one grey level of 255 on average on photographs; evaluation never comes here.
"""

import functools
import io
import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from jaxtyping import UInt8

from eqvision.data.decode import decode_bytes
from eqvision.data.transforms import CROP_SCALE, random_region

Pixels = UInt8[np.ndarray, "h w c"]
Part = UInt8[np.ndarray, "new_h new_w c"]
ORIENTATION_TAG = 0x0112
# EXIF orientation -> rows and columns swapped, rows reversed, columns reversed; in this order.
_UPRIGHT = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def fast_imagenet_train(
    data: bytes,
    name: str,
    rng: np.random.Generator,
    size: int,
    interpolation: str,
    in_channels: int = 3,
    scale: tuple[float, float] = CROP_SCALE,
) -> UInt8[np.ndarray, "{size} {size} {in_channels}"]:
    """``imagenet_train`` (random resized crop and flip) of an encoded image.

    A JPEG whose region is at least twice ``size`` each way is decoded at 1/2, 1/4 or 1/8 of its size, never below
    ``size``: large photographs cost a fraction. The region then falls on whole pixels of the reduced image, at most
    half of one away. Raises CorruptImageError as ``decode_bytes`` does.
    """
    cv2, _ = fast_libraries()
    header = _read_header(data)
    if header is None:
        pixels = decode_bytes(data, in_channels, name=name)
        shape = pixels.shape[:2]
        region = random_region(shape, rng, scale)
    else:
        shape = header.shape
        region = random_region(shape, rng, scale)
        pixels = _decode_jpeg(data, header, in_channels, name, shrink=min(region[2:]) / size)
    resized = _resize(_crop(pixels, shape, region), size, interpolation)
    flipped = cv2.flip(resized, 1) if rng.integers(2) else resized
    return flipped.reshape(size, size, in_channels)  # OpenCV drops an axis of length 1


def fast_decode(data: bytes, in_channels: int = 3, *, name: str) -> UInt8[np.ndarray, "h w {in_channels}"]:
    """``decode_bytes`` with simplejpeg for the JPEGs that it takes. Raises CorruptImageError as that does."""
    header = _read_header(data)
    if header is None:
        return decode_bytes(data, in_channels, name=name)
    return _decode_jpeg(data, header, in_channels, name, shrink=1.0)


@functools.cache
def fast_libraries() -> tuple[ModuleType, ModuleType]:
    """OpenCV and simplejpeg. Raises ImportError naming the extra."""
    try:
        import cv2
        import simplejpeg
    except ImportError as error:
        raise ImportError(
            f"data.decoder 'fast' needs OpenCV and simplejpeg ({error}): pip install eqvision[fast], "
            "or use data.decoder 'pillow'"
        ) from error
    cv2.setNumThreads(0)  # the stream has its own threads
    return cv2, simplejpeg


# JPEG


@dataclass(frozen=True)
class _Header:
    """Upright height and width of a JPEG, and the orientation in which it is stored."""

    shape: tuple[int, int]
    orientation: int


def _read_header(data: bytes) -> _Header | None:
    """None for what is left to Pillow: other formats, CMYK, broken headers, sizes that only an attack has."""
    from PIL import Image

    _, simplejpeg = fast_libraries()
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        orientation = _orientation(data)
    except (ValueError, OSError, SyntaxError):
        return None
    if colours in ("CMYK", "YCCK") or height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    swapped = _UPRIGHT.get(orientation, (False,))[0]
    return _Header((width, height) if swapped else (height, width), orientation)


def _orientation(data: bytes) -> int:
    """The EXIF orientation as Pillow reads it, 1 where there is none."""
    from PIL import Image

    if b"Exif\0\0" not in data and b"tiff:Orientation" not in data:  # most files: nothing to parse
        return 1
    with Image.open(io.BytesIO(data)) as opened:
        return opened.getexif().get(ORIENTATION_TAG, 1)


def _decode_jpeg(data: bytes, header: _Header, in_channels: int, name: str, shrink: float) -> np.ndarray:
    """Upright pixels, reduced by the largest of 1, 2, 4 and 8 that is no more than ``shrink``."""
    _, simplejpeg = fast_libraries()
    factor = max(f for f in (1, 2, 4, 8) if f <= max(shrink, 1))
    short = min(header.shape) // factor if factor > 1 else 0  # 0: no bound; the shorter side alone decides
    colours = "RGB" if in_channels == 3 else "GRAY"  # the file's own luma: Pillow's grey but for clipped colours
    try:
        pixels = simplejpeg.decode_jpeg(data, colours, min_height=short, min_width=short, min_factor=factor)
    except ValueError:  # strict about every warning: Pillow decides whether the file is readable
        return decode_bytes(data, in_channels, name=name)
    return _turn_upright(pixels.reshape(*pixels.shape[:2], in_channels), header.orientation)


def _turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    swap, reverse_rows, reverse_columns = _UPRIGHT.get(orientation, (False, False, False))
    pixels = pixels.swapaxes(0, 1) if swap else pixels
    return pixels[:: -1 if reverse_rows else 1, :: -1 if reverse_columns else 1]


def _crop(pixels: Pixels, shape: tuple[int, int], region: tuple[int, int, int, int]) -> Part:
    """The region (top, left, height, width) of an image of ``shape``, cut from the image or its reduced copy."""
    down, across = pixels.shape[0] / shape[0], pixels.shape[1] / shape[1]
    top, left = round(region[0] * down), round(region[1] * across)
    height, width = max(round(region[2] * down), 1), max(round(region[3] * across), 1)
    return pixels[top : top + height, left : left + width]


def _resize(pixels: Pixels, size: int, interpolation: str) -> np.ndarray:
    cv2, _ = fast_libraries()
    flag = _filter(cv2, interpolation, max(pixels.shape[:2]) / size)
    return cv2.resize(np.ascontiguousarray(pixels), (size, size), interpolation=flag)


def _filter(cv2: ModuleType, interpolation: str, shrink: float) -> int:
    """OpenCV's filters do not widen when they shrink, as Pillow's do: those that come closest to Pillow's bicubic."""
    if interpolation == "nearest":
        return cv2.INTER_NEAREST_EXACT
    if shrink >= 2 or interpolation == "box":
        return cv2.INTER_AREA
    if shrink > 1.25 or interpolation == "bilinear":
        return cv2.INTER_LINEAR
    return cv2.INTER_LANCZOS4 if interpolation == "lanczos" else cv2.INTER_CUBIC
