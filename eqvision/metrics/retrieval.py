"""Recall at k between images and texts, both ways: whether one of the right answers is among the k nearest."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

KS = (1, 5, 10)
BLOCK_SIZE = 2**24  # similarities that exist at a time

Pairs = Int[np.ndarray, "p 2"]  # (row of the one side, row of the other) that belong together


class RetrievalRecall(NamedTuple):
    """Shares in [0, 1] by k, for queries on either side; NaN where no query has an answer."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]

    def metrics(self) -> dict[str, float]:
        """By name: ``image_to_text/recall_at_1`` and so on."""
        return {
            f"{way}/recall_at_{k}": value for way, recalls in self._asdict().items() for k, value in recalls.items()
        }


def retrieval_recall(
    images: Float[np.ndarray, "n d"],
    texts: Float[np.ndarray, "m e"],
    pairs: Shaped[np.ndarray, "p _"],
    *,
    ks: Sequence[int] = KS,
    block_size: int = BLOCK_SIZE,
) -> RetrievalRecall:
    """Of how many images one of their texts is among the ``k`` most similar ones, and the other way round.

    The protocol of Karpathy and Fei-Fei 2015 for Flickr30k and COCO: an image may have several texts (any one of
    them counts), and here a text may have several images, too. ``pairs`` are (image, text) rows that belong together.
    Similarity is the inner product of the rows as they are given: give them unit length. A row without a partner is
    no query, but may be found. Wrong answers that are exactly as similar as the best right one come before it, so
    that a model for which everything is alike finds nothing. ``block_size`` similarities exist at a time.

    Raises ValueError for rows of different widths, values that are not finite, pairs out of range, and k below 1.
    """
    _check(images, texts, pairs, ks, block_size)
    both = np.unique(pairs.astype(np.int64), axis=0)
    there = answer_ranks(images, texts, both, block_size=block_size)
    back = answer_ranks(texts, images, both[:, ::-1], block_size=block_size)
    return RetrievalRecall(_recalls(there, ks), _recalls(back, ks))


def answer_ranks(
    queries: Float[np.ndarray, "n d"],
    gallery: Float[np.ndarray, "m d"],
    pairs: Pairs,
    *,
    block_size: int = BLOCK_SIZE,
) -> Int[np.ndarray, " _"]:
    """How many wrong answers come before the best right one, for every query with a right one, in order.

    ``pairs`` are different (query, answer) rows.
    """
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    asked, starts = np.unique(pairs[:, 0], return_index=True)
    ends = np.append(starts[1:], len(pairs))
    rows = max(1, block_size // max(1, len(gallery)))
    ranks = [
        _block_ranks(queries, gallery, pairs[starts[first] : ends[min(first + rows, len(asked)) - 1]])
        for first in range(0, len(asked), rows)
    ]
    return np.concatenate(ranks) if ranks else np.zeros(0, np.int64)


def _block_ranks(
    queries: Float[np.ndarray, "n d"], gallery: Float[np.ndarray, "m d"], pairs: Pairs
) -> Int[np.ndarray, " _"]:
    """Of the queries in ``pairs``, which are sorted by query."""
    asked, starts, query = np.unique(pairs[:, 0], return_index=True, return_inverse=True)
    similarities = queries[asked] @ gallery.T
    right = similarities[query, pairs[:, 1]]
    best = np.maximum.reduceat(right, starts)
    level = (similarities >= best[:, None]).sum(axis=1)  # right and wrong ones that are not behind the best right one
    return level - np.add.reduceat(_is_best(right, best[query]), starts)


def _is_best(right: Float[np.ndarray, " p"], best: Float[np.ndarray, " p"]) -> Int[np.ndarray, " p"]:
    equal: Bool[np.ndarray, " p"] = right >= best
    return equal.astype(np.int64)


def _recalls(ranks: Int[np.ndarray, " q"], ks: Sequence[int]) -> dict[int, float]:
    return {k: float((ranks < k).mean()) if len(ranks) else float("nan") for k in ks}


def _check(images: np.ndarray, texts: np.ndarray, pairs: np.ndarray, ks: Sequence[int], block_size: int) -> None:
    if images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"image features are {images.shape[1]} wide and text features {texts.shape[1]}; both must come from one "
            "model, after its projections"
        )
    for what, rows in (("image", images), ("text", texts)):
        wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(wrong):
            raise ValueError(f"{len(wrong)} {what} features are not finite, the first in row {wrong[0]}")
    if pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        raise ValueError(f"pairs have shape {pairs.shape} and type {pairs.dtype}; expected whole numbers [p 2]")
    for what, column, count in (("image", pairs[:, 0], len(images)), ("text", pairs[:, 1], len(texts))):
        if len(column) and not 0 <= column.min() <= column.max() < count:
            raise ValueError(f"pairs name {what} {column.min()} to {column.max()}, and there are {count}")
    if not ks or min(ks) < 1 or block_size < 1:
        raise ValueError(f"ks={tuple(ks)}, block_size={block_size}; expected numbers from 1 up")
