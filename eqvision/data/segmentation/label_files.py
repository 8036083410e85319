"""Label files: one class for each pixel, and how their values become class indices."""

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int16, Int64, UInt8

from eqvision.data.decode import CorruptImageError
from eqvision.types import IGNORE_LABEL

MOST_CLASSES = IGNORE_LABEL  # labels 0 to 254
_UNKNOWN = -1


class LabelValues(NamedTuple):
    """What the values of a data set's label files mean: ``classes[i]`` is the value of class i, the others are void.

    With ``strict`` only ``void`` and 255 are void, and any further value is an error.
    """

    classes: tuple[int, ...]
    void: tuple[int, ...] = ()
    strict: bool = True

    def table(self) -> Int16[np.ndarray, "256"]:
        """The class index of each value; 255 is void, -1 an error."""
        table = np.full(256, _UNKNOWN if self.strict else IGNORE_LABEL, np.int16)
        table[list(self.void)] = IGNORE_LABEL
        table[IGNORE_LABEL] = IGNORE_LABEL
        table[list(self.classes)] = np.arange(len(self.classes))
        return table


def counted_values(num_classes: int, void: Sequence[int]) -> LabelValues:
    """Values 0, 1, 2 ... are the classes, the void ones left out: classes behind them move down."""
    values = [value for value in range(IGNORE_LABEL) if value not in void]
    return LabelValues(tuple(values[:num_classes]), tuple(void))


def read_values(data: bytes, *, name: str) -> UInt8[np.ndarray, "h w"]:
    """The values of a label file: grey PNG of 1, 8 or 16 bits, or the positions in a palette.

    Raises CorruptImageError, which calls the file ``name``, where it is no image, has colours or values over 255.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as opened:
            mode, values = opened.mode, np.asarray(opened)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plug-ins raise many types; all are re-raised with the name
        raise CorruptImageError(f"corrupt label file {name}: {error or repr(error)}") from error
    if values.ndim != 2:
        raise CorruptImageError(
            f"label file {name} has colours ({mode}); expected one value for each pixel (grey, or a palette): the "
            "index of its class"
        )
    if values.dtype != bool and values.size and (values.min() < 0 or values.max() > IGNORE_LABEL):
        raise CorruptImageError(f"label file {name} has values {values.min()} to {values.max()}; expected 0 to 255")
    return values.astype(np.uint8)


def to_classes(
    values: UInt8[np.ndarray, "h w"], table: Int16[np.ndarray, "256"], *, name: str
) -> UInt8[np.ndarray, "h w"]:
    """Class indices, 255 for void. Raises ValueError, naming the file and a pixel, for a value that means nothing."""
    labels = table[values]
    if labels.size and labels.min() == _UNKNOWN:
        row, column = np.argwhere(labels == _UNKNOWN)[0]
        known = int(np.count_nonzero((table >= 0) & (table != IGNORE_LABEL)))
        raise ValueError(
            f"label file {name} has the value {values[row, column]} at row {row}, column {column}, which is none of "
            f"the {known} classes and not void; give its class a name (classes.txt), or list it in void_labels"
        )
    return labels.astype(np.uint8)


def largest_value(files: Iterable[Path], void: Sequence[int]) -> int:
    """The largest value in any of the files that is not void; -1 where there is none. Reads all of them."""
    seen = np.zeros(256, bool)
    for file in files:
        values = read_values(file.read_bytes(), name=str(file))
        seen |= np.bincount(values.ravel(), minlength=256) > 0
    seen[[*void, IGNORE_LABEL]] = False
    return int(np.flatnonzero(seen).max(initial=-1))


def pixel_counts(labels: Iterable[UInt8[np.ndarray, "h w"]], num_classes: int) -> Int64[np.ndarray, "{num_classes}"]:
    """How many pixels each class has; class weights are made of them (``losses.class_weights``)."""
    counts = np.zeros(num_classes, np.int64)
    for each in labels:
        counts += np.bincount(each.ravel(), minlength=256)[:num_classes]
    return counts


def image_size(file: str | os.PathLike) -> tuple[int, int]:
    """Height and width of the upright image, from its header. Raises CorruptImageError where there is none."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            turned = opened.getexif().get(0x0112, 1) >= 5  # EXIF's orientations 5 to 8 swap the sides
            return (opened.width, opened.height) if turned else (opened.height, opened.width)
    except (Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise CorruptImageError(f"corrupt image {Path(file).absolute()}: {error}") from error
    except OSError as error:
        if error.errno is not None:  # the file system's, no property of the image
            raise
        raise CorruptImageError(f"corrupt image {Path(file).absolute()}: {error}") from error
