"""What is known of the objects in one image, and the example that detection sources give to transforms and streams."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int32, Int64, UInt8


class Polygons(NamedTuple):
    """An object's outline: one array of alternating x and y (pixels) for each of its parts; together they are it.

    Without a part it covers nothing: of a COCO file, those of at least three corners are kept.
    """

    parts: tuple[Float64[np.ndarray, " _"], ...]


class CompressedRLE(NamedTuple):
    """A mask of ``size`` (height, width) as COCO's string of run lengths; see ``rle.py``."""

    size: tuple[int, int]
    counts: bytes


class UncompressedRLE(NamedTuple):
    """A mask of ``size`` (height, width) as run lengths, column by column, the first one of zeros."""

    size: tuple[int, int]
    counts: Int64[np.ndarray, " _"]


Segmentation = Polygons | CompressedRLE | UncompressedRLE | None
"""A mask as the file has it, not yet pixels; None for an object that has only a box."""


class Annotations(NamedTuple):
    """The objects of one image, in the order of the file.

    ``boxes`` are xyxy in pixels of the upright image: float32 and within it, or float64 and as the file has them
    (``CocoDetection.annotations`` and ``.truth``). ``labels`` are positions in the class names,
    not category ids. ``area`` is what the file says (COCO's figures by size go by it): of the mask, not of the box.
    ``iscrowd`` marks regions of many objects (or, from Pascal VOC, difficult ones), which are no targets of training
    and are ignored in evaluation. ``ids`` are those of the annotations.
    """

    boxes: Float[np.ndarray, "n 4"]
    labels: Int32[np.ndarray, " n"]
    area: Float64[np.ndarray, " n"]
    iscrowd: Bool[np.ndarray, " n"]
    ids: Int64[np.ndarray, " n"]
    segmentations: tuple[Segmentation, ...]


class DetectionExample(NamedTuple):
    """One image with its objects: what detection sources give, and what transforms take and give.

    ``boxes`` are xyxy in pixels of ``image``; ``masks`` are 0 or 1 at its size, or None where they were not asked
    for. ``original_size`` is (height, width) of the upright file, before any transform. ``index`` is the place in the
    source, ``weight`` 0 where the pixels are a stand-in.
    """

    image: UInt8[np.ndarray, "h w c"]
    boxes: Float32[np.ndarray, "g 4"]
    labels: Int32[np.ndarray, " g"]
    masks: UInt8[np.ndarray, "g h w"] | None
    image_id: int
    index: int
    original_size: tuple[int, int]
    weight: float = 1.0
