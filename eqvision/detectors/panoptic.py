"""One segment for every pixel, from DETR's masks (Carion et al. 2020, section 4.4), on the host."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Size = tuple[int, int]


class PanopticSegments(NamedTuple):
    """``ids`` has for every pixel the number of its segment, -1 where there is none; the rest is by segment."""

    ids: Int[np.ndarray, "h w"]
    labels: Int[np.ndarray, " s"]
    scores: Float[np.ndarray, " s"]
    areas: Int[np.ndarray, " s"]
    """In pixels of ``ids``."""


def panoptic_segments(
    logits: Float[np.ndarray, "q k"],
    masks: Float[np.ndarray, "q h w"],
    is_thing: Bool[np.ndarray, " classes"],
    *,
    padded: Size,
    size: Size,
    target_size: Size,
    threshold: float = 0.85,
    smallest: int = 4,
) -> PanopticSegments:
    """Segments of one image: DETR's ``PostProcessPanoptic``.

    Queries whose best class is an object and more probable than ``threshold`` compete for each pixel by their mask
    logits, resized to the image. Of queries of one stuff class the first gets the pixels of all; segments of at most
    ``smallest`` pixels go, and the pixels are shared out anew, until none is so small. ``padded`` is height and width
    of the batch's images, ``size`` of the part that is image, ``target_size`` of the result. The last logit is that
    of no object.
    """
    probabilities = _softmax(logits.astype(np.float32))
    labels, scores = probabilities.argmax(-1), probabilities.max(-1)
    kept = (labels != logits.shape[-1] - 1) & (scores > threshold)
    labels, scores, masks = labels[kept], scores[kept], masks[kept]
    resized = _resize(masks.astype(np.float32), padded)[:, : size[0], : size[1]]
    first = _first_of_stuff(labels, is_thing)
    ids, areas = _ids(resized, target_size, first)
    # The queries whose pixels were given away have none left and go too. Then their pixels are shared out again, among
    # all that remain and without merging: that is what the published figures are computed with.
    while (areas <= smallest).any():
        large = areas > smallest
        labels, scores, resized = labels[large], scores[large], resized[large]
        ids, areas = _ids(resized, target_size, np.arange(len(labels)))
    return PanopticSegments(ids, labels.astype(np.int32), scores, areas)


def _first_of_stuff(labels: Int[np.ndarray, " s"], is_thing: Bool[np.ndarray, " classes"]) -> Int[np.ndarray, " s"]:
    """For each query the one that gets its pixels: itself, or the first of its stuff class."""
    owners = [i if is_thing[label] else int(np.argmax(labels == label)) for i, label in enumerate(labels)]
    return np.asarray(owners, np.int64)


def _ids(
    masks: Float[np.ndarray, "s h w"], target_size: Size, owners: Int[np.ndarray, " s"]
) -> tuple[Int[np.ndarray, "h2 w2"], Int[np.ndarray, " s"]]:
    """The owner of each pixel, and the pixels of each."""
    if not len(masks):
        return np.full(target_size, -1, np.int32), np.zeros(0, np.int64)
    ids = owners[masks.argmax(0)]
    # Pixel centres, as Pillow resizes by nearest neighbours.
    rows, columns = ((2 * np.arange(n) + 1) * old // (2 * n) for n, old in zip(target_size, ids.shape, strict=True))
    ids = ids[rows[:, None], columns[None]].astype(np.int32)
    return ids, np.bincount(ids.ravel(), minlength=len(masks))


def _softmax(x: Float[np.ndarray, "q k"]) -> Float[np.ndarray, "q k"]:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _resize(x: Float[np.ndarray, "s h w"], size: Size) -> Float[np.ndarray, "s h2 w2"]:
    """Bilinear as torch does it: pixel centres, the border repeated, no filter for smaller sizes."""
    return _resize_axis(_resize_axis(x, size[0], 1), size[1], 2)


def _resize_axis(x: Shaped[np.ndarray, "s _ _"], new: int, axis: int) -> Shaped[np.ndarray, "s _ _"]:
    old = x.shape[axis]
    place = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    low = np.minimum(place.astype(np.int64), old - 1)
    high = np.minimum(low + 1, old - 1)
    share = (place - low).astype(np.float32).reshape((-1, 1) if axis == 1 else (1, -1))
    return np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
