"""A COCO data set (or one converted to it) as a source of images with boxes and masks."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from eqvision.data.decode import CorruptImageError, check_in_channels, decode_bytes
from eqvision.data.detection.annotations import Annotations, DetectionExample, Polygons
from eqvision.data.detection.index import EMPTY, NONE, CocoIndex, file_stamp, open_index, read_index
from eqvision.data.detection.layout import find_images, find_json, refuse_missing
from eqvision.data.detection.rle import coco_rle, decode_masks

log = logging.getLogger(__name__)


class Categories(NamedTuple):
    """The classes of a detector: label i has category id ``ids[i]`` in COCO files, and name ``names[i]``."""

    ids: tuple[int, ...]
    names: tuple[str, ...]


class Dropped(NamedTuple):
    """How many annotations a source leaves out, and why; each is counted once, under the first reason that fits."""

    empty_boxes: int
    """Width or height is 0 or less."""
    outside: int
    """Nothing of the box lies in the image."""
    crowd: int
    """Regions of many objects, left out of training."""
    no_mask: int
    """Masks were asked for, and there is none (``without_mask="drop"``), or none of its polygons has three corners."""


class CocoDetection:
    """Images and objects of a COCO instances file, decoded on access; ``len``, random access, safe in threads.

    ``path`` is the JSON file, or a folder in which ``split`` finds it (``layout.py`` lists the layouts);
    ``images`` is the folder of the images where it is another than usual. Labels are positions in ``category_ids``,
    the file's ids in order, unless ``categories`` gives those of a trained model; ids need not be contiguous.

    Boxes are clipped to the image, then those without area are left out, and so are crowd regions unless
    ``crowd="keep"`` (DETR, Detectron2 and torchvision drop them in training); ``dropped`` counts them. Images without
    objects stay unless ``keep_empty=False`` (DETR keeps them, Detectron2 does not). With ``masks`` examples have masks
    (needs the extra [coco]); objects without a segmentation raise ValueError, or with ``without_mask="drop"`` are left
    out, and so are those of whose polygons none has three corners.

    Images are turned upright by their EXIF orientation, as annotation tools show them. One that is corrupt, or of
    another size than the file says (its boxes would lie elsewhere), raises CorruptImageError; with
    ``on_corrupt="skip"`` it is logged once, counted in ``num_skipped`` and delivered black, without objects, with
    weight 0. Raises FileNotFoundError for missing images, with their absolute paths, and ValueError for what is wrong
    in the file.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str | None = None,
        *,
        images: str | os.PathLike | None = None,
        masks: bool = False,
        without_mask: str = "raise",
        crowd: str = "drop",
        keep_empty: bool = True,
        categories: Categories | None = None,
        in_channels: int = 3,
        on_corrupt: str = "raise",
    ):
        _check_choice("crowd", crowd, ("drop", "keep"))
        _check_choice("without_mask", without_mask, ("raise", "drop"))
        _check_choice("on_corrupt", on_corrupt, ("raise", "skip"))
        check_in_channels(in_channels)
        self.json = find_json(path, split)
        self._stamp = file_stamp(self.json)
        self.index = open_index(self.json)
        names = self.index.names()
        self.root = find_images(self.json, names[:20], images)
        refuse_missing(self.root, names, self.json)
        self.masks, self.on_corrupt, self.in_channels = masks, on_corrupt, in_channels
        own = Categories(tuple(self.index.category_ids.tolist()), self.index.class_names)
        self.categories = own if categories is None else categories
        self.class_names, self.category_ids = self.categories.names, self.categories.ids
        self._labels = _relabel(own, self.categories, self.json)
        if masks and without_mask == "raise":
            self._refuse_bare()
        self._valid, self._target, self.dropped = _sort_out(self.index, masks=masks, crowd=crowd)
        if self.dropped.no_mask:
            log.warning("%s: %d objects have no mask and are left out", self.json, self.dropped.no_mask)
        self._images = _chosen_images(self.index, self._target, keep_empty)
        self._skipped: dict[int, object] = {}

    @property
    def num_skipped(self) -> int:
        """How many different images were corrupt or of a wrong size so far, in this process."""
        return len(self._skipped)

    @property
    def image_ids(self) -> Int64[np.ndarray, " n"]:
        """Id of each image."""
        return self.index.image_ids[self._images]

    @property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """Height and width of each image, as the file says."""
        return np.stack([self.index.heights[self._images], self.index.widths[self._images]], axis=1)

    @property
    def num_objects(self) -> Int64[np.ndarray, " n"]:
        """How many objects each image has as targets."""
        return _per_image(self.index, self._target)[self._images]

    @property
    def label_counts(self) -> Int64[np.ndarray, " c"]:
        """How many targets have each label."""
        return np.bincount(self._labels[self.index.labels[self._target]], minlength=len(self.class_names))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> DetectionExample:
        index = range(len(self))[index]
        image = int(self._images[index])
        size = int(self.index.heights[image]), int(self.index.widths[image])
        try:
            pixels = decode_bytes(self.encoded(index), self.in_channels, name=self.describe(index))
            self._check_size(pixels, size, index)
        except CorruptImageError as error:
            return self._stand_in(index, size, error)
        found = self._select(image, self._target, outlines=self.masks)
        masks = self._decode_masks(found, size, index) if self.masks else None
        return DetectionExample(pixels, found.boxes, found.labels, masks, self._id(image), index, size)

    def annotations(self, index: int) -> Annotations:
        """All objects of an image whose clipped box has an area, crowd regions too."""
        return self._select(int(self._images[range(len(self))[index]]), self._valid, outlines=True)

    def truth(self, index: int) -> Annotations:
        """All objects of an image exactly as the file has them, for evaluation: boxes not clipped, none left out."""
        image = int(self._images[range(len(self))[index]])
        x, y, width, height = self.index.boxes_xywh[self.index.of_image(image)].T
        found = self._select(image, None, outlines=True)
        return found._replace(boxes=np.stack([x, y, x + width, y + height], axis=1))

    def truth_masks(self, index: int) -> Iterator[dict[str, Any]]:
        """The masks of ``truth`` in its order, as ``CocoMetric`` takes them; run lengths stay as the file has them.

        A crowd region without a segmentation is its box; polygons without three corners cover nothing, so that the
        object cannot be found. Raises ValueError for another object without a segmentation, ImportError without [coco].
        """
        image = int(self._images[range(len(self))[index]])
        span, size = self.index.of_image(image), (int(self.index.heights[image]), int(self.index.widths[image]))
        for row in range(span.start, span.stop):
            segmentation = self.index.segmentation(row)
            if segmentation is None and not self.index.iscrowd[row]:
                raise ValueError(
                    f"{self.json}: {self._bare_name(row)} has no segmentation, and masks are to be evaluated. "
                    "Give it one, remove it, or evaluate boxes only"
                )
            yield coco_rle(_rectangle(self.index.boxes_xywh[row]) if segmentation is None else segmentation, *size)

    def federated(self, index: int) -> tuple[Int32[np.ndarray, " _"], Int32[np.ndarray, " _"]]:
        """Under the rules of LVIS, the labels that were looked for and are not there, and those not all marked."""
        image = int(self._images[range(len(self))[index]])
        return self._labels[self.index.negative.row(image)], self._labels[self.index.not_exhaustive.row(image)]

    def encoded(self, index: int) -> bytes:
        """The content of the image file."""
        return Path(self.describe(index)).read_bytes()

    def describe(self, index: int) -> str:
        """Absolute path of the image file."""
        return os.path.join(self.root, self.index.file_names.text(int(self._images[index])))

    def _refuse_bare(self) -> None:
        """Crowd regions may do without: no target is made of them."""
        rows = np.flatnonzero((self.index.segmentations.kinds == NONE) & ~self.index.iscrowd)
        if rows.size:
            raise ValueError(
                f"{self.json}: {rows.size} of {len(self.index.labels)} objects have no segmentation, and masks were "
                f"asked for; the first is {self._bare_name(int(rows[0]))}. Give them outlines or run lengths, remove "
                "them, or train a detector of boxes alone; without_mask='drop' leaves them out as if nothing were there"
            )

    def _bare_name(self, row: int) -> str:
        image = int(self.index.image_of(np.array([row]))[0])
        return f"annotation {self.index.annotation_ids[row]} of image {self.index.file_names.text(image)}"

    def _id(self, image: int) -> int:
        return int(self.index.image_ids[image])

    def _select(self, image: int, wanted: Bool[np.ndarray, " m"] | None, *, outlines: bool) -> Annotations:
        columns, span = self.index, self.index.of_image(image)
        rows = np.arange(span.start, span.stop)
        rows = rows if wanted is None else rows[wanted[span]]
        height, width = columns.heights[image], columns.widths[image]
        return Annotations(
            boxes=_clipped(columns.boxes_xywh[rows], height, width),
            labels=self._labels[columns.labels[rows]],
            area=columns.area[rows],
            iscrowd=columns.iscrowd[rows],
            ids=columns.annotation_ids[rows],
            segmentations=tuple(columns.segmentation(row) if outlines else None for row in rows.tolist()),
        )

    def _decode_masks(self, found: Annotations, size: tuple[int, int], index: int) -> np.ndarray:
        try:
            return decode_masks(found.segmentations, *size)
        except ValueError as error:
            error.add_note(f"annotations {found.ids.tolist()[:8]} of {self.describe(index)} in {self.json}")
            raise

    def _check_size(self, pixels: np.ndarray, size: tuple[int, int], index: int) -> None:
        """Boxes of a picture of another size would be learnt without any error, at wrong places."""
        height, width = pixels.shape[:2]
        if (height, width) != size:
            turned = (height, width) == size[::-1]
            hint = (
                ". If it was annotated without regard to its EXIF orientation, remove that from the file "
                "(exiftool -Orientation= FILE)" if turned else ". Was it resized after it was annotated?"
            )  # fmt: skip
            raise CorruptImageError(
                f"image {self.describe(index)} is {width} x {height} (upright), but {self.json} says "
                f"{size[1]} x {size[0]}{hint}"
            )

    def _stand_in(self, index: int, size: tuple[int, int], error: CorruptImageError) -> DetectionExample:
        if self.on_corrupt == "raise":
            raise CorruptImageError(
                f"{error} (index {index}). Repair or remove it, or pass on_corrupt='skip' to give such images weight 0"
            ) from error
        mark = object()
        if self._skipped.setdefault(index, mark) is mark:  # one thread wins; no lock, which could not be pickled
            log.warning("skipped (weight 0): %s (index %d)", error, index)
        black = np.zeros((*size, self.in_channels), np.uint8)
        masks = np.zeros((0, *size), np.uint8) if self.masks else None
        boxes, labels = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
        image_id = self._id(int(self._images[index]))
        return DetectionExample(black, boxes, labels, masks, image_id, index, size, weight=0.0)

    def __getstate__(self) -> dict[str, Any]:
        """Workers map the stored columns themselves: pickled, they could be hundreds of megabytes for each."""
        stored = self.index.stored
        return self.__dict__ if stored is None else {**self.__dict__, "index": stored}

    def __setstate__(self, state: dict[str, Any]) -> None:
        index = state["index"]
        if isinstance(index, Path):
            index = read_index(index, state["_stamp"])
            if index is None:
                raise ValueError(f"{state['index']}, the index of {state['json']}, has gone or changed; start again")
        self.__dict__.update(state, index=index)


def _rectangle(xywh: Float64[np.ndarray, "4"]) -> Polygons:
    x, y, width, height = xywh.tolist()
    return Polygons((np.array([x, y, x + width, y, x + width, y + height, x, y + height]),))


def _check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{name}={value!r}; expected {' or '.join(map(repr, valid))}")


def _relabel(own: Categories, wanted: Categories, file: Path) -> Int32[np.ndarray, " c"]:
    """The label wanted for each of the file's categories. Raises ValueError for one that is not wanted."""
    names = dict(zip(wanted.ids, wanted.names, strict=True))
    for number, name in zip(*own, strict=True):
        if names.get(number) != name:
            instead = f"is {names[number]!r} there" if number in names else "does not exist there"
            shown = ", ".join(f"{i}={n}" for i, n in list(names.items())[:5]) + (" ..." if len(names) > 5 else "")
            raise ValueError(f"{file} has category {number}={name}, which {instead}; the categories wanted are {shown}")
    return np.array([wanted.ids.index(number) for number in own.ids], np.int32)


def _clipped(boxes_xywh: Float64[np.ndarray, "k 4"], height: Any, width: Any) -> Float32[np.ndarray, "k 4"]:
    """xyxy within images of that height and width (numbers, or one for each box)."""
    x, y, box_width, box_height = boxes_xywh.T
    columns = [x.clip(0, width), y.clip(0, height), (x + box_width).clip(0, width), (y + box_height).clip(0, height)]
    return np.stack(columns, axis=1).astype(np.float32)


def _sort_out(
    index: CocoIndex, *, masks: bool, crowd: str
) -> tuple[Bool[np.ndarray, " m"], Bool[np.ndarray, " m"], Dropped]:
    """Which annotations have a box, which of them are targets, and how many are not."""
    images = index.image_of(np.arange(len(index.labels)))
    boxes = _clipped(index.boxes_xywh, index.heights[images], index.widths[images])
    empty = (index.boxes_xywh[:, 2:] <= 0).any(axis=1)
    valid = ~empty & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    crowded = valid & index.iscrowd & (crowd == "drop")
    bare = valid & ~crowded & np.isin(index.segmentations.kinds, (NONE, EMPTY)) & masks
    counts = (each.sum().item() for each in (empty, ~valid & ~empty, crowded, bare))
    return valid, valid & ~crowded & ~bare, Dropped(*counts)


def _per_image(index: CocoIndex, wanted: Bool[np.ndarray, " m"]) -> Int64[np.ndarray, " n"]:
    before = np.concatenate([[0], np.cumsum(wanted)])
    return np.diff(before[index.last], prepend=0).astype(np.int64)


def _chosen_images(index: CocoIndex, target: Bool[np.ndarray, " m"], keep_empty: bool) -> Int64[np.ndarray, " k"]:
    if keep_empty:
        return np.arange(len(index.image_ids))
    return np.flatnonzero(_per_image(index, target) > 0)
