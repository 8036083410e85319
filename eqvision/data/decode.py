"""Image file -> uint8 pixels, by Pillow, with one rule per kind of file."""

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    import PIL.Image

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class CorruptImageError(ValueError):
    """A file that is listed as an image and cannot be decoded completely."""


def decode_image(path: str | os.PathLike, in_channels: int = 3) -> UInt8[np.ndarray, "h w {in_channels}"]:
    """Pixels of one image file; see ``decode_bytes``.

    Raises CorruptImageError for the image, and the plain OSError where the file system is at fault (missing file,
    no permission): that is no property of the image.
    """
    check_in_channels(in_channels)
    return decode_bytes(Path(path).read_bytes(), in_channels, name=str(Path(path).absolute()))


def decode_bytes(data: bytes, in_channels: int = 3, *, name: str) -> UInt8[np.ndarray, "h w {in_channels}"]:
    """Pixels of an encoded image, turned upright by its EXIF orientation; the first frame of an animation.

    Transparent pixels show white, 16-bit grey is scaled by 255/65535, CMYK and palettes become RGB. Raises
    CorruptImageError, which calls the image ``name``, where it is empty, truncated, not an image or float-valued.
    """
    return to_pixels(open_upright(data, in_channels, name=name))


def open_upright(data: bytes, in_channels: int = 3, *, name: str) -> "PIL.Image.Image":
    """``decode_bytes`` as a Pillow image of mode RGB or L, for those who go on in Pillow."""
    from PIL import Image, ImageOps

    check_in_channels(in_channels)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            return _to_mode(opened, "RGB" if in_channels == 3 else "L")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plug-ins raise many types; all are re-raised with the name
        raise CorruptImageError(f"corrupt image {name}: {_cause(data, error)}") from error


def to_pixels(image: "PIL.Image.Image") -> UInt8[np.ndarray, "h w c"]:
    """The array of a Pillow image of mode RGB or L."""
    return np.asarray(image).reshape(image.height, image.width, len(image.getbands()))


def _cause(data: bytes, error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if not data:
        return "the file is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):  # its own text has an address in memory, another one in each run
        return f"cannot identify image file: it begins with {data[:16]!r}"
    return str(error) or repr(error)


def readable_shape(data: bytes, in_channels: int) -> tuple[int, int, int] | None:
    """Height, width and channels from the header of an encoded image; None where the header cannot be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as opened:
            return opened.height, opened.width, in_channels
    except (Image.DecompressionBombError, SyntaxError, ValueError, OSError):
        return None


def check_in_channels(in_channels: int) -> None:
    """Files hold grey or colour pixels; anything else has to come as arrays."""
    if in_channels not in (1, 3):
        raise ValueError(
            f"in_channels={in_channels}: image files are read as 3 (RGB) or 1 (grey) channels; "
            "use eqvision.data.Arrays for images with other channel counts"
        )


def _to_mode(image: "PIL.Image.Image", mode: str) -> "PIL.Image.Image":
    from PIL import Image

    if image.mode.startswith("I"):
        return Image.fromarray(_scale_16_bit(np.asarray(image))).convert(mode)
    if image.mode == "F":
        raise ValueError("its pixels are 32-bit floats, whose range is unknown; save it as 8-bit or use arrays")
    if image.has_transparency_data:
        image = _on_white(image)
    return image if image.mode == mode else image.convert(mode)


def _scale_16_bit(grey: np.ndarray) -> np.ndarray:
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"its integer pixels span {grey.min()}..{grey.max()}; expected 0..65535")
    return ((grey.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _on_white(image: "PIL.Image.Image") -> "PIL.Image.Image":
    from PIL import Image

    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
