"""The texts of a source: each once, and which images they are about."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from eqvision.data.pairs.source import PairSource


class TextGallery(NamedTuple):
    """Different texts in the order in which they first come, and the (image, text) rows that belong together."""

    texts: tuple[str, ...]
    pairs: Int[np.ndarray, "p 2"]


def all_captions(source: PairSource) -> Iterator[str]:
    """Every text of every image; no image is read."""
    for index in range(len(source)):
        yield from source.captions(index)


def text_gallery(source: PairSource) -> TextGallery:
    """What is searched for, and in, by ``metrics.retrieval_recall``. Images that share a text share its row."""
    rows: dict[str, int] = {}
    pairs = [
        (index, rows.setdefault(text, len(rows))) for index in range(len(source)) for text in source.captions(index)
    ]
    return TextGallery(tuple(rows), np.unique(np.array(pairs, np.int64).reshape(-1, 2), axis=0))
