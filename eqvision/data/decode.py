"""Image file -> uint8 pixels, by Pillow, with one rule per kind of file."""

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
    """Pixels of one image file, turned upright by its EXIF orientation; the first frame of an animation.

    Transparent pixels show white, 16-bit grey is scaled by 255/65535, CMYK and palettes become RGB. Raises
    CorruptImageError for a file that is empty, truncated, not an image or float-valued, and the plain
    OSError where the file system is at fault (missing file, no permission): that is no property of the image.
    """
    from PIL import Image, ImageOps

    check_in_channels(in_channels)
    try:
        with Image.open(path) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            return _to_channels(upright, in_channels)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plug-ins raise many types; all are re-raised with the path
        if isinstance(error, OSError) and error.errno is not None:
            raise
        cause = "the file is empty (0 bytes)" if os.path.getsize(path) == 0 else str(error) or repr(error)
        raise CorruptImageError(f"corrupt image {Path(path).absolute()}: {cause}") from error


def readable_shape(path: str | os.PathLike, in_channels: int) -> tuple[int, int, int] | None:
    """Height, width and channels from the header alone; None where the header cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return opened.height, opened.width, in_channels
    except (Image.DecompressionBombError, SyntaxError, ValueError):
        return None
    except OSError as error:
        if error.errno is not None:  # the file system, not the file
            raise
        return None


def check_in_channels(in_channels: int) -> None:
    """Files hold grey or colour pixels; anything else has to come as arrays."""
    if in_channels not in (1, 3):
        raise ValueError(
            f"in_channels={in_channels}: image files are read as 3 (RGB) or 1 (grey) channels; "
            "use eqvision.data.Arrays for images with other channel counts"
        )


def _to_channels(image: "PIL.Image.Image", in_channels: int) -> np.ndarray:
    if image.mode.startswith("I"):
        grey = _scale_16_bit(np.asarray(image))
        return np.repeat(grey[..., None], in_channels, axis=-1)
    if image.mode == "F":
        raise ValueError("its pixels are 32-bit floats, whose range is unknown; save it as 8-bit or use arrays")
    if image.has_transparency_data:
        image = _on_white(image)
    pixels = np.asarray(image.convert("RGB" if in_channels == 3 else "L"))
    return pixels.reshape(image.height, image.width, in_channels)


def _scale_16_bit(grey: np.ndarray) -> np.ndarray:
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"its integer pixels span {grey.min()}..{grey.max()}; expected 0..65535")
    return ((grey.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _on_white(image: "PIL.Image.Image") -> "PIL.Image.Image":
    from PIL import Image

    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
