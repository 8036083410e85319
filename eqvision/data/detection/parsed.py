"""What readers of other formats hand to ``convert.py``."""

from pathlib import Path
from typing import NamedTuple


class ParsedObject(NamedTuple):
    """One object: ``name`` of its class, box as left, top, right, bottom edges in pixels of the upright image.

    ``crowd`` objects are ignored in training and evaluation. ``polygon`` is x, y, x, y ... in pixels, or None.
    """

    name: str
    box: tuple[float, float, float, float]
    area: float
    crowd: bool = False
    polygon: tuple[float, ...] | None = None


class ParsedImage(NamedTuple):
    """One image file (absolute path) with its objects."""

    file: Path
    height: int
    width: int
    objects: tuple[ParsedObject, ...]


class ParsedSet(NamedTuple):
    """A data set: the classes in order, and its images."""

    class_names: tuple[str, ...]
    images: tuple[ParsedImage, ...]


def upright_size(file: Path) -> tuple[int, int]:
    """Height and width of an image, from its header, as it is shown: turned by its EXIF orientation.

    Raises CorruptImageError where the header cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    from eqvision.data.decode import CorruptImageError

    try:
        with Image.open(file) as image:
            sideways = image.getexif().get(_ORIENTATION, 1) >= 5
            return (image.width, image.height) if sideways else (image.height, image.width)
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise CorruptImageError(f"corrupt image {file}: its size cannot be read ({error})") from error


_ORIENTATION = 0x0112
