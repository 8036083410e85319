"""Examples of several sizes -> one padded batch."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eqvision.data.detection.annotations import DetectionExample
from eqvision.data.detection.sizes import Size
from eqvision.data.detection.transforms import keep_objects
from eqvision.types import DetectionBatch, DetectionTargets

log = logging.getLogger(__name__)


class Collate:
    """Examples and a size -> ``DetectionBatch``: images at the top left and zeros elsewhere, ``max_objects`` rows.

    Of an image with more objects the largest by the area of the box are kept; ``num_dropped`` counts the others, and
    the first such image is named in a warning. With ``masks`` the targets carry them. Rows that only pad the batch
    are black, of the full size, and without objects. Raises ValueError, naming the example, for an image larger than
    the size, for channels that differ and for missing masks.
    """

    def __init__(self, *, max_objects: int, masks: bool, describe: Callable[[int], str]):
        if max_objects < 1:
            raise ValueError(f"max_objects={max_objects}; expected the rows for targets of an image, 1 or more")
        self.max_objects, self.masks, self._describe = max_objects, masks, describe
        self.num_dropped = 0
        self._lock = threading.Lock()

    def __call__(self, examples: Sequence[DetectionExample], num_rows: int, size: Size, channels: int) -> Any:
        batch = _empty_batch(num_rows, size, channels, self.max_objects if self.masks else None, self.max_objects)
        for row, example in enumerate(examples):
            self._check(example, size, channels)
            _write(batch, row, self._limited(example))
        return batch

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


def _empty_batch(num_rows: int, size: Size, channels: int, mask_rows: int | None, max_objects: int) -> DetectionBatch:
    full = np.tile(np.array(size, np.int32), (num_rows, 1))  # not 0: models divide by it, and NaN would spread
    targets: tuple[Any, ...] = (
        np.zeros((num_rows, max_objects, 4), np.float32),
        np.zeros((num_rows, max_objects), np.int32),
        np.zeros((num_rows, max_objects), bool),
        None if mask_rows is None else np.zeros((num_rows, mask_rows, *size), np.uint8),
    )
    columns: tuple[Any, ...] = (
        np.zeros((num_rows, *size, channels), np.uint8),
        full,
        full.copy(),
        DetectionTargets(*targets),
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
    if targets.masks is not None and count:
        targets.masks[row, :count, :height, :width] = example.masks
