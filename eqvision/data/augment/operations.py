"""Single operations on images, by Pillow. Each takes a Pillow image of mode L or RGB, a value and a canvas.

What a value means and its range stand at the function. Grey levels are those of Pillow's ImageOps and ImageEnhance.
How strong and how often an operation is used is for ``policies.py`` to say.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import UInt8

from eqvision.names import nearest

if TYPE_CHECKING:
    import PIL.Image

Image = UInt8[np.ndarray, "h w c"]
Fill = int | tuple[int, ...]  # grey level 0..255, one for all channels or one for each
AFFINE_FILTERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # Pillow's numbers; its affine maps know no others


class Canvas(NamedTuple):
    """What operations that move pixels need: Pillow's filter number, and the colour of uncovered pixels."""

    filter_number: int = 3
    fill: Fill = 128


def auto_contrast(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Each channel stretched so that its darkest pixel becomes 0 and its brightest 255; no value."""
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def equalize(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """The histogram of each channel made flat; no value."""
    from PIL import ImageOps

    return ImageOps.equalize(image)


def invert(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """255 minus the pixel; no value."""
    from PIL import ImageOps

    return ImageOps.invert(image)


def posterize(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Only the first ``value`` bits of each pixel, 0 (black) to 8 (unchanged)."""
    # By hand: ImageOps.posterize refuses 0 bits from Pillow 13 on, and the published tables ask for them.
    mask = 256 - 2 ** (8 - int(value))
    return image.point([level & mask for level in range(256)] * len(image.getbands()))


def solarize(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Pixels from ``value`` up inverted; 0 inverts all, 256 none."""
    from PIL import ImageOps

    return ImageOps.solarize(image, int(value))


def solarize_add(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """``value`` added to pixels below 128, at most to 255."""
    table = [min(255, level + int(value)) if level < 128 else level for level in range(256)]
    return image.point(table * len(image.getbands()))


def color(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Saturation: 0 is grey, 1 unchanged, above 1 stronger. A grey image stays as it is."""
    from PIL import ImageEnhance

    return image if image.mode == "L" else ImageEnhance.Color(image).enhance(value)


def contrast(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Distance from the mean grey of the image: 0 is a flat image, 1 unchanged."""
    from PIL import ImageEnhance

    return ImageEnhance.Contrast(image).enhance(value)


def brightness(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Factor of all pixels: 0 is black, 1 unchanged."""
    from PIL import ImageEnhance

    return ImageEnhance.Brightness(image).enhance(value)


def sharpness(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """0 is smoothed, 1 unchanged, above 1 sharpened."""
    from PIL import ImageEnhance

    return ImageEnhance.Sharpness(image).enhance(value)


def rotate(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Turned about the centre by ``value`` degrees, counter-clockwise; the size stays."""
    return image.rotate(value, canvas.filter_number, fillcolor=_fill_of(image, canvas))  # pyright: ignore


def shear_x(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Row y moved left by ``value * y`` pixels: ``value`` is the tangent of the angle."""
    return _affine(image, (1, value, 0, 0, 1, 0), canvas)


def shear_y(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Column x moved up by ``value * x`` pixels."""
    return _affine(image, (1, 0, 0, value, 1, 0), canvas)


def translate_x(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Moved left by ``value`` pixels."""
    return _affine(image, (1, 0, value, 0, 1, 0), canvas)


def translate_y(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Moved up by ``value`` pixels."""
    return _affine(image, (1, 0, 0, 0, 1, value), canvas)


def translate_x_rel(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Moved left by the share ``value`` of the width."""
    return translate_x(image, value * image.width, canvas)


def translate_y_rel(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Moved up by the share ``value`` of the height."""
    return translate_y(image, value * image.height, canvas)


def grayscale(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Without colour, in as many channels as before (ITU-R 601 luma); no value."""
    return image if image.mode == "L" else image.convert("L").convert("RGB")


def gaussian_blur(image: "PIL.Image.Image", value: float, canvas: Canvas) -> "PIL.Image.Image":
    """Blurred with a standard deviation of ``value`` pixels (Pillow's approximation by box filters)."""
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(value))


Operation = Callable[["PIL.Image.Image", float, Canvas], "PIL.Image.Image"]
OPERATIONS: dict[str, Operation] = {
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "invert": invert,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "color": color,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
    "rotate": rotate,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "translate_x_rel": translate_x_rel,
    "translate_y_rel": translate_y_rel,
    "grayscale": grayscale,
    "gaussian_blur": gaussian_blur,
}


def apply_operation(
    image: Image, name: str, value: float = 0.0, interpolation: str = "bicubic", fill: Fill = 128
) -> Image:
    """One of ``OPERATIONS`` on pixels. Raises UnknownNameError, and ValueError for other than 1 or 3 channels."""
    if name not in OPERATIONS:
        raise nearest(name, list(OPERATIONS), "operation")
    return from_pillow(OPERATIONS[name](to_pillow(image), value, make_canvas(interpolation, fill)))


def make_canvas(interpolation: str, fill: Fill) -> Canvas:
    """Raises UnknownNameError for a filter that affine maps do not have, ValueError for a fill outside 0..255."""
    if interpolation not in AFFINE_FILTERS:
        raise nearest(interpolation, list(AFFINE_FILTERS), "interpolation of affine maps")
    levels = (fill,) if isinstance(fill, int) else tuple(fill)
    if len(levels) not in (1, 3) or not all(0 <= level <= 255 for level in levels):
        raise ValueError(f"fill={fill}; expected a level in 0..255, or three of them for RGB")
    return Canvas(AFFINE_FILTERS[interpolation], fill)


def to_pillow(image: Image) -> "PIL.Image.Image":
    """Grey or RGB pixels as a Pillow image. Raises ValueError for other numbers of channels."""
    from PIL import Image as pillow

    channels = image.shape[-1]
    if channels not in (1, 3):
        raise ValueError(
            f"the image has {channels} channels; augmentation policies and colour jitter know 1 (grey) and 3 (RGB). "
            "Set augment.policy none and augment.color_jitter 0"
        )
    return pillow.fromarray(np.ascontiguousarray(image if channels == 3 else image[..., 0]))


def from_pillow(image: "PIL.Image.Image") -> Image:
    """The pixels of an image of mode L or RGB."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _affine(image: "PIL.Image.Image", matrix: tuple[int | float, ...], canvas: Canvas) -> "PIL.Image.Image":
    from PIL import Image as pillow

    # Shifts by whole pixels copy, whatever the filter, and "nearest" copies fastest.
    whole = all(value == int(value) for value in matrix)
    resample = pillow.Resampling.NEAREST if whole else pillow.Resampling(canvas.filter_number)
    fill = _fill_of(image, canvas)
    return image.transform(image.size, pillow.Transform.AFFINE, matrix, resample, fillcolor=fill)  # pyright: ignore


def _fill_of(image: "PIL.Image.Image", canvas: Canvas) -> Fill:
    """One level for a grey image (the mean of several), one for each channel of an RGB image."""
    levels = (canvas.fill,) if isinstance(canvas.fill, int) else canvas.fill
    if image.mode == "L":
        return round(sum(levels) / len(levels))
    return tuple(levels) * (3 // len(levels))
