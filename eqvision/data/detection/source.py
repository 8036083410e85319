"""What detection streams ask of a source."""

from typing import Protocol, runtime_checkable

import numpy as np

from eqvision.data.detection.annotations import DetectionExample


@runtime_checkable
class DetectionSource(Protocol):
    """Random access to examples, and the size of every image without decoding it."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label."""
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

    def __getitem__(self, index: int) -> DetectionExample: ...

    def describe(self, index: int) -> str:
        """Names one example in an error message."""
        ...
