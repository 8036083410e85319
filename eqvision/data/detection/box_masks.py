"""Masks of annotated objects as small squares: what lies in a box of each, made on the host."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from eqvision.data.detection.annotations import Polygons, Segmentation
from eqvision.data.detection.rle import decode_mask
from eqvision.ops.mask_ops import crop_mask


def mask_in_box(
    segmentation: Segmentation,
    box: Float[np.ndarray, "4"],
    size: int,
    *,
    image_size: tuple[int, int],
    min_side: float = 0.1,
) -> UInt8[np.ndarray, "{size} {size}"]:
    """0 or 1 in each of ``size`` x ``size`` parts of ``box`` (xyxy, pixels), of one object of an image.

    Polygons are moved, stretched and drawn at this size, as by detectron2's ``rasterize_polygons_within_box``; sides
    of the box count as at least ``min_side`` pixels: 0.1 there, 1 in mmdet. Other masks are decoded and cropped as by
    ``BitMasks.crop_and_resize``. None gives zeros. Raises what ``decode_mask`` raises.
    """
    if isinstance(segmentation, Polygons):
        return _drawn(segmentation, np.asarray(box, np.float64), size, min_side)
    if segmentation is None:
        return np.zeros((size, size), np.uint8)
    return crops_in_boxes(decode_mask(segmentation, *image_size)[None], box[None], size)[0]


def masks_in_boxes(
    segmentations: Sequence[Segmentation],
    boxes: Float[np.ndarray, "n 4"],
    size: int,
    *,
    image_size: tuple[int, int],
    min_side: float = 0.1,
) -> UInt8[np.ndarray, "n {size} {size}"]:
    """``mask_in_box`` of each object; with their own boxes and size 112 the ``masks`` and ``frames`` of ``crop_masks``.

    One object at a time is decoded at the size of the image.
    """
    masks = np.zeros((len(segmentations), size, size), np.uint8)
    for row, segmentation, box in zip(masks, segmentations, boxes, strict=True):
        row[:] = mask_in_box(segmentation, box, size, image_size=image_size, min_side=min_side)
    return masks


def crops_in_boxes(
    masks: UInt8[np.ndarray, "n h w"], boxes: Float[np.ndarray, "n 4"], size: int
) -> UInt8[np.ndarray, "n {size} {size}"]:
    """What of each mask lies in its box (xyxy, pixels), as ``BitMasks.crop_and_resize``: 1 where the mean is 0.5 or
    more. A box without area gives zeros.
    """
    crops = np.zeros((len(masks), size, size), np.uint8)
    for row, mask, box in zip(crops, masks, boxes, strict=True):
        row[:] = crop_mask(mask, box, size) >= 0.5
    return crops


def _drawn(polygons: Polygons, box: np.ndarray, size: int, min_side: float) -> UInt8[np.ndarray, "n n"]:
    if not polygons.parts:
        return np.zeros((size, size), np.uint8)
    scale = size / np.maximum(box[2:] - box[:2], min_side)
    moved = tuple(((part.reshape(-1, 2) - box[:2]) * scale).reshape(-1) for part in polygons.parts)
    return decode_mask(Polygons(moved), size, size)
