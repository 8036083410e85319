"""Images with label files beside them, in the layouts of ``layouts.py``."""

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8

from eqvision.data.decode import CorruptImageError, check_in_channels, decode_bytes
from eqvision.data.detection.sizes import Size
from eqvision.data.segmentation.label_files import (
    MOST_CLASSES,
    LabelValues,
    counted_values,
    image_size,
    largest_value,
    read_values,
    to_classes,
)
from eqvision.data.segmentation.layouts import Found, find_segmentation
from eqvision.data.segmentation.source import SegmentationExample
from eqvision.types import IGNORE_LABEL

log = logging.getLogger(__name__)

_STAND_IN: Size = (1, 1)  # height and width of what stands for a corrupt image, whose own may be unknown


class FolderSegmentation:
    """The images of a split with a class for each pixel.

    ``PATH/train/*.jpg`` with ``PATH/train_labels/*.png``, ``PATH/images/train`` with ``PATH/labels/train``, and the
    layouts of Cityscapes, ADE20K, COCO-Stuff and Oxford-IIIT Pet; ``layout`` names one of ``LAYOUTS``, None looks for
    all. Plain folders need to be told: values of the label files are class indices, 255 and ``void_labels`` void;
    classes behind a void value move down. Names come from ``PATH/classes.txt`` (line i for the value i, lines of void
    values without effect). Without that file they are the values themselves, up to the largest one in any split,
    for which all label files are read once; ``class_names``, as of the training split, spares that.

    ``on_corrupt="skip"`` gives images that cannot be read, or do not fit their labels, weight 0 and black pixels.
    Raises FileNotFoundError, UnknownNameError and ValueError for what does not fit; see ``find_segmentation``.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str | None = None,
        *,
        layout: str | None = None,
        class_names: Sequence[str] | None = None,
        void_labels: Sequence[int] = (),
        in_channels: int = 3,
        on_corrupt: str = "raise",
    ):
        check_in_channels(in_channels)
        if on_corrupt not in ("raise", "skip"):
            raise ValueError(f"unknown on_corrupt {on_corrupt!r}; expected 'raise' or 'skip'")
        if any(not 0 <= value <= IGNORE_LABEL for value in void_labels):
            raise ValueError(f"void_labels={tuple(void_labels)}; expected values of label files, 0 to 255")
        self.root, self.split = Path(path).expanduser().absolute(), split
        found = find_segmentation(self.root, split, layout)
        self.layout, self.pairs = found.layout, found.pairs
        self.class_names, self.values = _classes(found, self.root, class_names, tuple(void_labels))
        self.in_channels, self.on_corrupt = in_channels, on_corrupt
        self._table = self.values.table()
        self._skipped: dict[int, object] = {}

    @property
    def num_skipped(self) -> int:
        """How many different images were corrupt so far, in this process."""
        return len(self._skipped)

    @functools.cached_property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """Height and width of each image, from the headers of the files, which are read when first asked for."""
        return np.array([self._size(image) for image, _ in self.pairs], np.int32)

    def _size(self, image: Path) -> Size:
        try:
            return image_size(image)
        except CorruptImageError:
            if self.on_corrupt == "raise":
                raise
            return _STAND_IN  # logged and counted when the image is read

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> SegmentationExample:
        index = range(len(self))[index]
        try:
            image = decode_bytes(self.encoded(index), self.in_channels, name=self.describe(index))
            labels = self.truth(index)
            self._check_size(image, labels, index)
        except CorruptImageError as error:
            return self._stand_in(index, error)
        height, width = labels.shape
        return SegmentationExample(image, labels, (height, width), index)

    def truth(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """The labels of an image at the size of its file, for evaluation."""
        file = self.pairs[range(len(self))[index]][1]
        return to_classes(read_values(file.read_bytes(), name=str(file)), self._table, name=str(file))

    def encoded(self, index: int) -> bytes:
        """The content of the image file."""
        return self.pairs[index][0].read_bytes()

    def describe(self, index: int) -> str:
        """Absolute path of the image file."""
        return str(self.pairs[index][0])

    def _check_size(self, image: np.ndarray, labels: np.ndarray, index: int) -> None:
        """Labels of another size would be learnt without any error, at wrong places."""
        (height, width), (rows, columns) = image.shape[:2], labels.shape
        if (height, width) == (rows, columns):
            return
        turned = (height, width) == (columns, rows)
        hint = (
            "the labels were made without regard to the EXIF orientation of the image: remove that from the file "
            "(exiftool -Orientation= FILE)" if turned else "resize the labels by the nearest pixel, or mend the file"
        )  # fmt: skip
        raise CorruptImageError(
            f"image {self.describe(index)} is {height}x{width} (height x width, upright) and its labels "
            f"{self.pairs[index][1]} are {rows}x{columns}; {hint}"
        )

    def _stand_in(self, index: int, error: CorruptImageError) -> SegmentationExample:
        if self.on_corrupt == "raise":
            raise CorruptImageError(
                f"{error} (index {index}). Repair or remove it, or pass on_corrupt='skip' to give such images weight 0"
            ) from error
        mark = object()
        if self._skipped.setdefault(index, mark) is mark:  # one thread wins; no lock, which could not be pickled
            log.warning("skipped (weight 0): %s (index %d)", error, index)
        image, labels = np.zeros((*_STAND_IN, self.in_channels), np.uint8), np.full(_STAND_IN, IGNORE_LABEL, np.uint8)
        return SegmentationExample(image, labels, _STAND_IN, index, weight=0.0)


def _classes(
    found: Found, root: Path, given: Sequence[str] | None, void: tuple[int, ...]
) -> tuple[tuple[str, ...], LabelValues]:
    """Names and values, from the layout, from the user, or from the label files."""
    if found.values is not None and found.class_names is not None:
        return _of_layout(found, given, void)
    names = _without_void(found.class_names, void) if given is None else tuple(given)
    if names is None:
        others = (file for folder in found.other_labels for file in sorted(folder.glob("*.png")))
        largest = largest_value((*(labels for _, labels in found.pairs), *others), void)
        values = tuple(value for value in range(largest + 1) if value not in void)
        names = tuple(map(str, values))
    if not 1 <= len(names) <= MOST_CLASSES - len(set(void) - {IGNORE_LABEL}):
        raise ValueError(f"{root} has {len(names)} classes; expected 1 to {MOST_CLASSES}, the void ones among them")
    return names, counted_values(len(names), void)


def _of_layout(found: Found, given: Sequence[str] | None, void: tuple[int, ...]) -> tuple[tuple[str, ...], LabelValues]:
    names, values = found.class_names, found.values
    assert names is not None
    assert values is not None
    if void:
        raise ValueError(
            f"void_labels={void}, but the layout {found.layout!r} says itself what is void; leave it out, or pass "
            "layout='folder'"
        )
    if given is not None and len(given) != len(names):
        raise ValueError(f"{len(given)} class_names for the layout {found.layout!r}, which has {len(names)} classes")
    return names if given is None else tuple(given), values


def _without_void(names: tuple[str, ...] | None, void: tuple[int, ...]) -> tuple[str, ...] | None:
    return None if names is None else tuple(name for value, name in enumerate(names) if value not in void)
