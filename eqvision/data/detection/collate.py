"""Examples of several sizes -> one padded batch."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from eqvision.data.detection.annotations import DetectionExample
from eqvision.data.detection.box_masks import crops_in_boxes
from eqvision.data.detection.sizes import Size
from eqvision.data.detection.transforms import keep_objects
from eqvision.types import DetectionBatch, DetectionTargets

log = logging.getLogger(__name__)


class Collate:
    """Examples and a size -> ``DetectionBatch``: images at the top left and zeros elsewhere, ``max_objects`` rows.

    Of an image with more objects the largest by the area of the box are kept; ``num_dropped`` counts the others, and
    the first such image is named in a warning. With ``masks`` the targets carry them, at the size of the batch or,
    with ``mask_crop``, as squares of that side: what lies in each object's box, which is its frame. Rows that only pad
    the batch are black, of the full size, and without objects. Raises ValueError for values that do not fit and, naming
    the example, for an image larger than the size, for channels that differ and for missing masks.
    """

    def __init__(self, *, max_objects: int, masks: bool, describe: Callable[[int], str], mask_crop: int | None = None):
        if max_objects < 1:
            raise ValueError(f"max_objects={max_objects}; expected the rows for targets of an image, 1 or more")
        if mask_crop is not None and mask_crop < 1:
            raise ValueError(
                f"mask_crop={mask_crop}; expected the side of the squares that hold masks, 1 or more, or None for "
                "masks at the size of the batch"
            )
        self.max_objects, self.masks, self._describe = max_objects, masks, describe
        self.mask_crop = mask_crop if masks else None
        self.num_dropped = 0
        self._lock = threading.Lock()

    def __call__(self, examples: Sequence[DetectionExample], num_rows: int, size: Size, channels: int) -> Any:
        batch = _empty_batch(num_rows, size, channels, self._empty_targets(num_rows, size))
        for row, example in enumerate(examples):
            self._check(example, size, channels)
            _write(batch, row, self._limited(example))
        return batch

    def _empty_targets(self, num_rows: int, size: Size) -> DetectionTargets:
        rows, crop = (num_rows, self.max_objects), self.mask_crop
        cells = size if crop is None else (crop, crop)
        targets: tuple[Any, ...] = (
            np.zeros((*rows, 4), np.float32),
            np.zeros(rows, np.int32),
            np.zeros(rows, bool),
            np.zeros((*rows, *cells), np.uint8) if self.masks else None,
            None if crop is None else np.zeros((*rows, 4), np.float32),
        )
        return DetectionTargets(*targets)

    def _check(self, example: DetectionExample, size: Size, channels: int) -> None:
        height, width = example.image.shape[:2]
        if height > size[0] or width > size[1]:
            raise ValueError(
                f"{self._name(example)} is {height}x{width} (height x width) after the transform and does not fit "
                f"into its batch of {size[0]}x{size[1]}: use a larger bucket, or resize to less. Where several buckets "
                "are in use, the size of its file is not the one that the source gave, or output_size is wrong"
            )
        if example.image.shape[2] != channels:
            raise ValueError(
                f"{self._name(example)} has {example.image.shape[2]} channels and others have {channels}; a batch "
                "needs the same for all: let the source convert them"
            )
        if self.masks and example.masks is None and len(example.boxes):
            raise ValueError(f"{self._name(example)} has no masks; open the source with masks, or set masks=False")

    def _limited(self, example: DetectionExample) -> DetectionExample:
        excess = len(example.boxes) - self.max_objects
        if excess <= 0:
            return example
        self._count(example, excess)
        sides = example.boxes[:, 2:] - example.boxes[:, :2]
        largest = np.argsort(-(sides[:, 0] * sides[:, 1]), kind="stable")[: self.max_objects]
        return keep_objects(example, np.sort(largest))

    def _count(self, example: DetectionExample, excess: int) -> None:
        with self._lock:
            first, self.num_dropped = self.num_dropped == 0, self.num_dropped + excess
        if first:
            log.warning(
                "%s has %d objects; only the max_objects=%d largest are kept, here and in other images (said once)",
                self._name(example), self.max_objects + excess, self.max_objects,
            )  # fmt: skip

    def _name(self, example: DetectionExample) -> str:
        return self._describe(example.index)


def _empty_batch(num_rows: int, size: Size, channels: int, targets: DetectionTargets) -> DetectionBatch:
    full = np.tile(np.array(size, np.int32), (num_rows, 1))  # not 0: models divide by it, and NaN would spread
    columns: tuple[Any, ...] = (
        np.zeros((num_rows, *size, channels), np.uint8),
        full,
        full.copy(),
        targets,
        np.zeros(num_rows, np.float32),
        np.full(num_rows, -1, np.int32),
    )
    return DetectionBatch(*columns)


def _write(batch: Any, row: int, example: DetectionExample) -> None:
    height, width = example.image.shape[:2]
    count, targets = len(example.boxes), batch.targets
    batch.images[row, :height, :width] = example.image
    batch.size[row], batch.original_size[row] = (height, width), example.original_size
    batch.weights[row], batch.indices[row] = example.weight, example.index
    targets.boxes[row, :count], targets.labels[row, :count] = example.boxes, example.labels
    targets.valid[row, :count] = True
    if targets.frames is not None:
        targets.frames[row, :count] = example.boxes
    if targets.masks is not None and count:
        _write_masks(targets, row, example)


def _write_masks(targets: Any, row: int, example: DetectionExample) -> None:
    masks = cast(np.ndarray, example.masks)  # looked at in ``Collate._check``
    if targets.frames is None:
        targets.masks[row, : len(masks), : masks.shape[1], : masks.shape[2]] = masks
    else:
        targets.masks[row, : len(masks)] = crops_in_boxes(masks, example.boxes, targets.masks.shape[-1])
