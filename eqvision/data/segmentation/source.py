"""What segmentation sources give, and what streams ask of them."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8


class SegmentationExample(NamedTuple):
    """One image with a class for each pixel: what sources give, and what transforms take and give.

    ``labels`` are class indices, ``IGNORE_LABEL`` (255) on void pixels. ``original_size`` is (height, width) of the
    upright file, before any transform. ``index`` is the place in the source, ``weight`` 0 where the pixels are a
    stand-in.
    """

    image: UInt8[np.ndarray, "h w c"]
    labels: UInt8[np.ndarray, "h w"]
    original_size: tuple[int, int]
    index: int
    weight: float = 1.0


@runtime_checkable
class SegmentationSource(Protocol):
    """Random access to examples, and the size of every image without decoding it."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class."""
        ...

    @property
    def num_skipped(self) -> int:
        """Corrupt images that have been left out so far."""
        ...

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of each image as ``__getitem__`` gives it: integers ``[n 2]``."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SegmentationExample: ...

    def describe(self, index: int) -> str:
        """Names one example in an error message."""
        ...
