"""Masks as COCO stores them: run-length codes of both kinds, and polygons; their pixels are those of pycocotools.

A mask is read column by column, and its runs of zeros and ones are counted, zeros first. Uncompressed, these counts
are a list; compressed, each count from the third on has that two places before subtracted and is written in groups of
five bits, as characters from "0" on. A polygon is drawn at five times the size and belongs to a pixel by rules of its
own, which differ by up to a pixel from those of Pillow and OpenCV.

The work is done by faster-coco-eval (extra ``[coco]``), which evaluation needs anyway. Its pixels and strings equal
pycocotools' on every case that was tried (tests hold it to that), and it refuses codes that do not fit their size,
where pycocotools 2.0.11 returns memory that it never wrote. Boxes need none of this, nor the extra.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

from eqvision.data.detection.annotations import CompressedRLE, Polygons, Segmentation, UncompressedRLE


def decode_mask(segmentation: Segmentation, height: int, width: int) -> UInt8[np.ndarray, "{height} {width}"]:
    """Pixels (0 or 1) of one object; None is a mask of zeros.

    Raises ValueError for run lengths of another size or that do not add up to it, and ImportError without [coco], which
    uncompressed run lengths do not need.
    """
    return np.ascontiguousarray(_pixels(segmentation, height, width))


def decode_masks(segmentations: tuple[Segmentation, ...], height: int, width: int) -> UInt8[np.ndarray, "n h w"]:
    """``decode_mask`` of each of them, stacked."""
    masks = np.zeros((len(segmentations), height, width), np.uint8)
    for row, segmentation in zip(masks, segmentations, strict=True):
        row[:] = _pixels(segmentation, height, width)
    return masks


def _pixels(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """The mask in the library's order, column by column."""
    if segmentation is None:
        return np.zeros((height, width), np.uint8)
    try:
        if isinstance(segmentation, UncompressedRLE) and segmentation.size == (height, width):
            counts = _checked(segmentation.counts, height * width)
            return np.repeat(np.arange(len(counts), dtype=np.uint8) & 1, counts).reshape(width, height).T
        return _library().decode(_as_rle(segmentation, height, width))
    except (ValueError, TypeError) as error:
        raise ValueError(f"mask of {height} x {width} cannot be decoded: {error}") from error


def encode_mask(mask: UInt8[np.ndarray, "h w"] | Bool[np.ndarray, "h w"]) -> CompressedRLE:
    """Compressed run lengths; what is not 0 is 1."""
    height, width = mask.shape
    code = _library().encode(np.asfortranarray(mask != 0).view(np.uint8))
    return CompressedRLE((height, width), code["counts"])


def encode_uncompressed(mask: UInt8[np.ndarray, "h w"] | Bool[np.ndarray, "h w"]) -> UncompressedRLE:
    """Run lengths as numbers; what is not 0 is 1. Needs no extra."""
    height, width = mask.shape
    flat = (mask != 0).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    counts = np.diff(changes, prepend=0, append=flat.size).astype(np.int64)
    return UncompressedRLE((height, width), counts)


def coco_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Compressed run lengths as evaluators take them: ``{"size": [height, width], "counts": bytes}``."""
    if segmentation is None:
        segmentation = UncompressedRLE((height, width), np.array([height * width]))
    return _as_rle(segmentation, height, width)


def compress(segmentation: Polygons | UncompressedRLE, height: int, width: int) -> CompressedRLE:
    """Compressed run lengths of an object of another kind, without going through its pixels."""
    return CompressedRLE((height, width), _as_rle(segmentation, height, width)["counts"])


def mask_area(segmentation: Segmentation, height: int, width: int) -> int:
    """Pixels of the mask."""
    return 0 if segmentation is None else int(_library().area(_as_rle(segmentation, height, width)))


def mask_box(segmentation: Segmentation, height: int, width: int) -> Float64[np.ndarray, "4"]:
    """xyxy of the mask's outermost pixels; zeros for an empty mask."""
    if segmentation is None:
        return np.zeros(4)
    x, y, box_width, box_height = _library().toBbox(_as_rle(segmentation, height, width))
    return np.array([x, y, x + box_width, y + box_height], np.float64)


def _as_rle(segmentation: Polygons | CompressedRLE | UncompressedRLE, height: int, width: int) -> dict[str, Any]:
    if isinstance(segmentation, Polygons) and not segmentation.parts:
        segmentation = UncompressedRLE((height, width), np.array([height * width]))
    if isinstance(segmentation, Polygons):
        library = _library()
        return library.merge(library.frPyObjects([part.tolist() for part in segmentation.parts], height, width))
    if segmentation.size != (height, width):
        raise ValueError(f"a mask of size {segmentation.size} is no mask of an image of {(height, width)}")
    if isinstance(segmentation, CompressedRLE):
        return {"size": [height, width], "counts": segmentation.counts}
    return _library().frPyObjects({"size": [height, width], "counts": _checked(segmentation.counts, height * width)},
                                  height, width)  # fmt: skip


def _checked(counts: Int64[np.ndarray, " _"], pixels: int) -> list[int]:
    if (counts < 0).any() or counts.sum() != pixels:
        raise ValueError(f"its run lengths {counts[:5].tolist()} ... add up to {counts.sum()}, expected {pixels}")
    return counts.tolist()


def _library() -> Any:
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ImportError("masks of COCO files need faster-coco-eval: pip install 'eqvision[coco]'") from error
    return mask
