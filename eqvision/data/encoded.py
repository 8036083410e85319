"""What all sources of encoded images share: decoding, and what happens to images that are corrupt."""

import difflib
import logging
from collections import Counter
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from eqvision.data.decode import CorruptImageError, check_in_channels, decode_bytes, readable_shape
from eqvision.data.sources import Example, Source

log = logging.getLogger(__name__)


@runtime_checkable
class EncodedSource(Source, Protocol):
    """A source whose images lie somewhere as JPEG, PNG and so on. All of them can be pickled and used by threads."""

    def encoded(self, index: int) -> bytes:
        """The image as it is stored, not decoded. Raises OSError where the storage is at fault."""
        ...


class ImageDecoder:
    """Decodes the images of one source, and keeps account of those that cannot be decoded.

    Such an image raises CorruptImageError; with ``on_corrupt="skip"`` it is logged once, counted in ``num_skipped``
    and delivered black with weight 0, so that order and shapes stay as they were.
    """

    def __init__(self, in_channels: int, on_corrupt: str):
        if on_corrupt not in ("raise", "skip"):
            raise ValueError(f"on_corrupt={on_corrupt!r}; expected 'raise' or 'skip'")
        check_in_channels(in_channels)
        self.in_channels, self.on_corrupt = in_channels, on_corrupt
        self._skipped: dict[int, object] = {}
        self._stand_in_shape: tuple[int, int, int] | None = None

    @property
    def num_skipped(self) -> int:
        """How many different images could not be decoded so far, in this process."""
        return len(self._skipped)

    def example(self, source: EncodedSource, index: int) -> Example:
        """Example number ``index`` (negative ones count from the end) of the source."""
        index = range(len(source))[index]
        try:
            pixels = decode_bytes(source.encoded(index), self.in_channels, name=source.describe(index))
            return Example(pixels, source.labels[index], index)
        except CorruptImageError as error:
            return self._stand_in(source, index, error)

    def _stand_in(self, source: EncodedSource, index: int, error: CorruptImageError) -> Example:
        if self.on_corrupt == "raise":
            raise CorruptImageError(
                f"{error} (index {index}). Repair or remove it, leave it out (eqvision data check lists all such "
                "images), or pass on_corrupt='skip' to give them weight 0"
            ) from error
        mark = object()
        if self._skipped.setdefault(index, mark) is mark:  # one thread wins; no lock, which could not be pickled
            log.warning("skipped (weight 0): %s (index %d)", error, index)
        if self._stand_in_shape is None:
            self._stand_in_shape = _first_readable_shape(source, self.in_channels)
        return Example(np.zeros(self._stand_in_shape, np.uint8), source.labels[index], index, weight=0.0)


def _first_readable_shape(source: EncodedSource, in_channels: int) -> tuple[int, int, int]:
    # Not the shape of whichever image came last: that would depend on the threads.
    for index in range(len(source)):
        try:
            shape = readable_shape(source.encoded(index), in_channels)
        except CorruptImageError:  # a record whose checksum is wrong
            continue
        if shape is not None:
            return shape
    return 1, 1, in_channels


def class_positions(class_names: tuple[str, ...]) -> dict[str, int]:
    """Class name -> label. Raises ValueError for a name that comes twice."""
    twice = sorted(name for name, count in Counter(class_names).items() if count > 1)
    if twice:
        raise ValueError(f"class_names has duplicates: {', '.join(twice)}")
    return {name: position for position, name in enumerate(class_names)}


def labels_of_names(names: list[str], class_names: tuple[str, ...], where: str) -> Int[np.ndarray, " n"]:
    """Labels of classes by name; ``where`` begins the ValueError about a name that is not in ``class_names``."""
    positions = class_positions(class_names)
    for name in names:
        if name not in positions:
            near = difflib.get_close_matches(name, class_names, n=3)
            hint = f"; nearest: {', '.join(near)}" if near else f": {', '.join(class_names[:5])} ..."
            raise ValueError(f"{where}{name} is not among the {len(class_names)} class_names{hint}")
    return np.array([positions[name] for name in names], np.int32)
