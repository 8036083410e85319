"""From what data and detectors say of objects to what pictures show: masks at the size of the image."""

from collections.abc import Sequence
from typing import overload

import numpy as np
from jaxtyping import Bool, UInt8

from eqvision.data.detection import Annotations, Segmentation, UncompressedRLE, decode_mask
from eqvision.detection_pictures import DrawnObjects
from eqvision.ops import PasteRule, paste_mask, pasted_run_lengths
from eqvision.types import Detections, DetectionTargets

Size = tuple[int, int]


class DecodedMasks(Sequence):
    """Masks of one image of ``size`` (height, width), each made when it is asked for: of a photograph, 100 of them
    would take a gigabyte."""

    def __init__(self, segmentations: Sequence[Segmentation], size: Size):
        self._segmentations, self._size = tuple(segmentations), size

    def __len__(self) -> int:
        return len(self._segmentations)

    @overload
    def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w"]: ...
    @overload
    def __getitem__(self, index: slice) -> "DecodedMasks": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return DecodedMasks(self._segmentations[index], self._size)
        return decode_mask(self._segmentations[index], *self._size)


def drawn_truth(truth: Annotations, size: Size) -> DrawnObjects:
    """Annotated objects of an image of ``size`` (height, width); masks where they have any."""
    known = any(each is not None for each in truth.segmentations)
    return DrawnObjects(truth.boxes, truth.labels, masks=DecodedMasks(truth.segmentations, size) if known else None)


def drawn_found(
    found: Detections, size: Size, *, paste: PasteRule | None = None, least_score: float = 0.0
) -> DrawnObjects:
    """The valid objects of a row of ``Detections`` (no batch axis) with at least that score.

    ``paste`` puts R-CNN's masks, in boxes, into the image of ``size``; None leaves masks out.
    """
    boxes, scores, labels, valid = map(np.asarray, found[:4])
    kept = np.flatnonzero(valid & (scores >= least_score))
    masks = None
    if paste is not None and found.masks is not None:
        codes = pasted_masks(np.asarray(found.masks)[kept], boxes[kept], size, rule=paste)
        masks = DecodedMasks(codes, size)
    return DrawnObjects(boxes[kept], labels[kept], scores[kept], masks)


def pasted_masks(masks: np.ndarray, boxes: np.ndarray, size: Size, *, rule: PasteRule) -> tuple[UncompressedRLE, ...]:
    """``ops.pasted_run_lengths`` as segmentations."""
    codes = pasted_run_lengths(np.asarray(masks, np.float32), boxes, size, rule=rule)
    return tuple(UncompressedRLE(size, np.array(code["counts"], np.int64)) for code in codes)


def target_masks(targets: DetectionTargets, row: int, size: Size) -> list[UInt8[np.ndarray, "h w"]] | None:
    """Of the valid objects of an image in a batch of ``size``; squares are put back into their frames, which shows
    what the detector can learn of them. None where the targets have no masks."""
    if targets.masks is None:
        return None
    valid = np.asarray(targets.valid)[row]
    masks = np.asarray(targets.masks)[row][valid]
    if targets.frames is None:
        return list(masks)
    frames = np.asarray(targets.frames)[row][valid]
    pasted: list[Bool[np.ndarray, "h w"]] = [
        paste_mask(mask.astype(np.float32), frame, size) for mask, frame in zip(masks, frames, strict=True)
    ]
    return [mask.astype(np.uint8) for mask in pasted]
