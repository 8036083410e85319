"""What sources of images with captions give, and what streams ask of them."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8


class PairExample(NamedTuple):
    """One image with all that may be said of it; ``index`` is its place in the source, ``weight`` 0 where the pixels
    are a stand-in."""

    image: UInt8[np.ndarray, "h w c"]
    captions: tuple[str, ...]
    index: int
    weight: float = 1.0


@runtime_checkable
class PairSource(Protocol):
    """Random access to images, and to their captions without touching an image."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of images that have a class, for zero-shot classification; empty where they have none."""
        ...

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        """The class of each image; -1 where it has none."""
        ...

    @property
    def num_skipped(self) -> int:
        """Corrupt images that have been left out so far."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> PairExample: ...

    def captions(self, index: int) -> tuple[str, ...]:
        """What may be said of an image: at least one text, none of them empty."""
        ...

    def describe(self, index: int) -> str:
        """Names one example in an error message."""
        ...
