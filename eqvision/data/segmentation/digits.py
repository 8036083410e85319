"""Embedded demo: which digit, if any, each pixel of a scene of real handwritten digits belongs to."""

import numpy as np
from jaxtyping import Int32, UInt8

from eqvision.data.detection.scenes import DigitScenes
from eqvision.data.detection.sizes import Size
from eqvision.data.segmentation.source import SegmentationExample


class DigitSegmentation:
    """``DigitScenes`` with a class for each pixel: 0 background, 1 to 10 the digits 0 to 9, the front one where two
    overlap. There are no void pixels. The options and errors are those of ``DigitScenes``.
    """

    class_names = ("background", *DigitScenes.class_names)
    num_skipped = 0

    def __init__(
        self,
        split: str,
        *,
        size: int | Size = 96,
        channels: int = 3,
        max_digits: int = 6,
        digit_size: tuple[int, int] = (16, 40),
        length: int | None = None,
        seed: int = 0,
    ):
        self._scenes = DigitScenes(
            split, size=size, channels=channels, max_digits=max_digits, digit_size=digit_size, length=length, seed=seed
        )

    @property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """The canvas, for each scene."""
        return self._scenes.sizes

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> SegmentationExample:
        scene = self._scenes[index]
        masks = scene.masks
        assert masks is not None
        numbers = (scene.labels + 1).astype(np.uint8)[:, None, None]
        labels = (masks * numbers).sum(axis=0, dtype=np.uint8)  # each mask is what can be seen: they share no pixel
        return SegmentationExample(scene.image, labels, scene.original_size, scene.index)

    def truth(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """The labels of a scene."""
        return self[index].labels

    def describe(self, index: int) -> str:
        """Number of the scene and what it was made from."""
        return self._scenes.describe(index)
