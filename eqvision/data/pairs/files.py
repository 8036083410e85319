"""Captioned image files, however their captions were written down."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Int, Int64

from eqvision.data.detection.layout import refuse_missing
from eqvision.data.encoded import ImageDecoder
from eqvision.data.packed import PackedStrings, pack_strings
from eqvision.data.pairs.source import PairExample

log = logging.getLogger(__name__)


class CaptionRow(NamedTuple):
    """An image file, relative to the folder of the images, and one text about it."""

    file: str
    caption: str


class Captions(NamedTuple):
    """The texts of all images one behind the other; those of image i end before ``ends[i]``."""

    texts: PackedStrings
    ends: Int64[np.ndarray, " n"]

    def of(self, index: int) -> tuple[str, ...]:
        """All texts of an image."""
        return tuple(self.texts.text(i) for i in range(self.ends[index - 1] if index else 0, self.ends[index]))


class CaptionedFiles:
    """Images with captions, decoded on access; made by ``captioned_folder`` and ``coco_captions``.

    ``rows`` may name a file several times; images come in the order of their first row. White space around a text is
    removed. A text that is then empty says nothing about an image: it is left out, and so is an image without any
    other; ``num_empty`` counts the texts, and a warning names the first. ``on_corrupt`` is as for ``ImageDecoder``.
    Raises FileNotFoundError for missing images, with their absolute paths, and ValueError where nothing is left;
    ``origin`` is where the captions were read.
    """

    class_names: tuple[str, ...] = ()

    def __init__(
        self, rows: Iterable[CaptionRow], root: Path, origin: Path, *, in_channels: int = 3, on_corrupt: str = "raise"
    ):
        self._decoder = ImageDecoder(in_channels, on_corrupt)
        self.root, self.origin = root, origin
        texts, self.num_empty = _by_file(rows, origin)
        if not texts:
            raise ValueError(f"{origin} has no captions; expected a text about at least one image")
        refuse_missing(root, list(texts), origin)
        self._files = pack_strings(texts)
        ends = np.cumsum([len(each) for each in texts.values()], dtype=np.int64)
        self._captions = Captions(pack_strings(text for each in texts.values() for text in each), ends)
        self.labels: Int[np.ndarray, " n"] = np.full(len(ends), -1, np.int32)

    @property
    def num_skipped(self) -> int:
        """How many different files could not be decoded so far."""
        return self._decoder.num_skipped

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> PairExample:
        found = self._decoder.example(cast(Any, self), index)  # which gives captions in place of a label
        return PairExample(found.image, self.captions(found.index), found.index, found.weight)

    def captions(self, index: int) -> tuple[str, ...]:
        """What is said of an image, in the order of the rows."""
        return self._captions.of(range(len(self))[index])

    def encoded(self, index: int) -> bytes:
        """The content of the file."""
        return Path(self.describe(index)).read_bytes()

    def describe(self, index: int) -> str:
        """Absolute path of the file."""
        return os.path.join(self.root, self._files.text(index))


def _by_file(rows: Iterable[CaptionRow], origin: Path) -> tuple[dict[str, list[str]], int]:
    """The texts of each file, and how many were empty."""
    texts: dict[str, list[str]] = {}
    empty: list[str] = []
    for file, caption in rows:
        text = _cleaned(caption)
        if text:
            texts.setdefault(file, []).append(text)
        else:
            empty.append(file)
    if empty:
        without = len(set(empty) - set(texts))
        log.warning(
            "%s: %d empty captions are left out, and %d images that have no other (the first is of %s)",
            origin, len(empty), without, empty[0],
        )  # fmt: skip
    return texts, len(empty)


def _cleaned(text: str) -> str:
    """Without white space around it, and without halves of characters, which JSON can hold and no file."""
    return text.encode("utf-8", "replace").decode("utf-8").strip()
