"""Masks of everything in an image, without prompts (Kirillov et al. 2023, section 5 and appendix B).

A grid of points asks for three masks each; kept are those that the model believes in, that hardly change with the
threshold, and that no better one covers. Crops of the image, each with its own grid, find smaller things.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8

from eqvision.data.detection.annotations import UncompressedRLE
from eqvision.data.detection.rle import encode_uncompressed
from eqvision.ops.nms import nms
from eqvision.segmenters.sam.images import resize_logits
from eqvision.segmenters.sam.predictor import Predictor

Crop = tuple[int, int, int, int]  # x1, y1, x2, y2
EDGE = 20.0  # pixels to a crop's edge, from which on a mask counts as cut off
NMS_ROWS = 1024  # boxes are filled up to a multiple of it


@dataclass(frozen=True)
class MaskSearch:
    """What ``find_masks`` looks for; the defaults are those of the official ``SamAutomaticMaskGenerator``.

    Raises ValueError for options that no image could be searched with.
    """

    points_per_side: int = 32
    """Rows and columns of the grid on the whole image."""
    least_iou: float = 0.88
    """Masks of which the model expects no more are dropped."""
    least_stability: float = 0.95
    """And those whose IoU between thresholds at plus and minus ``stability_offset`` is less."""
    stability_offset: float = 1.0
    most_overlap: float = 0.7
    """IoU of boxes above which the worse mask is dropped."""
    crop_layers: int = 0
    """Layer 1 has 2 x 2 crops, layer 2 has 4 x 4 ..."""
    crop_overlap: float = 512 / 1500
    """Of the shorter side, how much crops of layer 1 overlap."""
    crop_points_divisor: int = 1
    """By which the points per side are divided from layer to layer."""
    most_crop_overlap: float = 0.7
    """``most_overlap`` between crops, of which the smaller counts as better."""

    def __post_init__(self) -> None:
        least = self.points_per_side // self.crop_points_divisor**self.crop_layers if self.crop_points_divisor else 0
        if self.crop_layers < 0 or least < 1:
            raise ValueError(
                f"MaskSearch: {self.points_per_side} points per side, divided by {self.crop_points_divisor} in each of "
                f"{self.crop_layers} layers of crops, must leave one or more"
            )
        for name in ("most_overlap", "most_crop_overlap", "crop_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"MaskSearch: {name} must be in 0..1, got {getattr(self, name)}")


class FoundMask(NamedTuple):
    """A mask at the size of the image as run lengths, and where it is from.

    ``box`` (xyxy, pixels) is drawn around its pixels, ``iou`` what the model expects, ``point`` the prompt.
    """

    run_lengths: UncompressedRLE
    box: tuple[float, float, float, float]
    iou: float
    stability: float
    point: tuple[float, float]
    crop: Crop


def find_masks(
    predictor: Predictor,
    image: UInt8[np.ndarray, "h w 3"],
    search: MaskSearch | None = None,
    *,
    progress: Callable[[int], object] | None = None,
) -> list[FoundMask]:
    """All masks of an image, those first that the model believes in most.

    The points go through the decoder in the predictor's batches (64 is usual), all by one program. Masks are enlarged
    one after the other and kept as run lengths, so that memory does not grow with their number. The predictor has the
    last crop as its image afterwards. ``progress`` is told after each batch how many points it had; there are
    ``count_points`` in all.
    """
    search = MaskSearch() if search is None else search
    size, found = (image.shape[0], image.shape[1]), []
    crops = crop_boxes(size, search.crop_layers, search.crop_overlap)
    for crop, layer in crops:
        masks = list(_in_crop(predictor, image, crop, _side(search, layer), search, progress))
        found += _without_overlap(masks, [mask.iou for mask in masks], search.most_overlap)
    if len(crops) > 1:
        smaller_first = [1 / ((crop[2] - crop[0]) * (crop[3] - crop[1])) for crop in (mask.crop for mask in found)]
        found = _without_overlap(found, smaller_first, search.most_crop_overlap)
    return sorted(found, key=lambda mask: -mask.iou)


def count_points(search: MaskSearch) -> int:
    """Of all crops of an image."""
    return sum(4**layer * _side(search, layer) ** 2 for layer in range(search.crop_layers + 1))


def _side(search: MaskSearch, layer: int) -> int:
    """Points per side in crops of a layer."""
    return search.points_per_side // search.crop_points_divisor**layer


def point_grid(side: int) -> Float[np.ndarray, "n 2"]:
    """Centres x, y of ``side`` x ``side`` equal cells of the unit square, row by row."""
    places = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(places, places), axis=-1).reshape(-1, 2)


def crop_boxes(size: tuple[int, int], layers: int, overlap: float = 512 / 1500) -> list[tuple[Crop, int]]:
    """The whole image and overlapping crops of it, each with its layer."""
    height, width = size
    boxes: list[tuple[Crop, int]] = [((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        count = 2**layer
        shared = int(overlap * min(size) * (2 / count))
        w, h = (math.ceil((shared * (count - 1) + side) / count) for side in (width, height))
        for i, j in itertools.product(range(count), repeat=2):
            x, y = (w - shared) * i, (h - shared) * j
            boxes.append(((x, y, min(x + w, width), min(y + h, height)), layer))
    return boxes


def _in_crop(
    predictor: Predictor,
    image: np.ndarray,
    crop: Crop,
    side: int,
    search: MaskSearch,
    progress: Callable[[int], object] | None,
) -> Iterator[FoundMask]:
    """Masks that are good enough, of the grid's points one after the other."""
    x1, y1, x2, y2 = crop
    predictor.set_image(np.ascontiguousarray(image[y1:y2, x1:x2]))
    points = point_grid(side) * np.array([x2 - x1, y2 - y1])
    size, first = (image.shape[0], image.shape[1]), 0
    for batch in predictor.logits(points[:, None], np.ones((len(points), 1), np.int64)):
        for row, number in zip(*np.nonzero(batch.iou[:, 1:] > search.least_iou), strict=True):
            logits = resize_logits(batch.logits[row, 1 + number], predictor.sizes)
            stability = stability_score(logits, search.stability_offset)
            mask = logits > 0
            if not stability >= search.least_stability or not mask.any():
                continue
            box = _box_of(mask) + np.array([x1, y1, x1, y1])
            if not _is_cut_off(box, crop, size):
                x, y = points[first + row] + np.array([x1, y1])
                iou = float(batch.iou[row, 1 + number])
                yield _found(mask, box, iou, stability, (float(x), float(y)), crop, size)
        first += len(batch.iou)
        if progress is not None:
            progress(len(batch.iou))


def stability_score(logits: Float[np.ndarray, "h w"], offset: float = 1.0) -> float:
    """IoU of the masks at thresholds ``offset`` above and below zero; NaN where both are empty."""
    above, below = np.count_nonzero(logits > offset), np.count_nonzero(logits > -offset)
    return above / below if below else math.nan


def _box_of(mask: Bool[np.ndarray, "h w"]) -> np.ndarray:
    """First and last column and row, as x1, y1, x2, y2: the last is inside, as in the official code."""
    columns, rows = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]])


def _is_cut_off(box: np.ndarray, crop: Crop, size: tuple[int, int]) -> bool:
    """Whether a side lies at an edge of the crop that is no edge of the image."""
    near_crop = np.abs(box - np.array(crop)) <= EDGE
    near_image = np.abs(box - np.array([0, 0, size[1], size[0]])) <= EDGE
    return bool(np.any(near_crop & ~near_image))


def _found(
    mask: Bool[np.ndarray, "h w"],
    box: np.ndarray,
    iou: float,
    stability: float,
    point: tuple[float, float],
    crop: Crop,
    size: tuple[int, int],
) -> FoundMask:
    if mask.shape != size:
        whole = np.zeros(size, bool)
        whole[crop[1] : crop[3], crop[0] : crop[2]] = mask
        mask = whole
    x1, y1, x2, y2 = map(float, box)
    return FoundMask(encode_uncompressed(mask), (x1, y1, x2 + 1, y2 + 1), iou, stability, point, crop)


def _without_overlap(masks: list[FoundMask], scores: list[float], most: float) -> list[FoundMask]:
    """Those that non-maximum suppression keeps, by boxes to the last pixel's number, as in the official code."""
    if not masks:
        return []
    rows = -(-len(masks) // NMS_ROWS) * NMS_ROWS
    boxes, ranks = np.zeros((rows, 4), np.float32), np.zeros(rows, np.float32)
    boxes[: len(masks)] = np.array([mask.box for mask in masks]) - np.array([0, 0, 1, 1])
    ranks[: len(masks)] = scores
    valid = np.arange(rows) < len(masks)
    keep = np.asarray(nms(jnp.asarray(boxes), jnp.asarray(ranks), threshold=most, valid=jnp.asarray(valid)))
    return [mask for mask, kept in zip(masks, keep, strict=False) if kept]
