"""COCO average precision and recall, gathered image by image; the figures come from faster-coco-eval (extra [coco])."""

import pickle
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from eqvision.metrics.coco_figures import (
    KINDS,
    CocoResult,
    Found,
    ImageRecord,
    Truth,
    coco_result,
    encode_mask,
    mask_area,
)
from eqvision.names import nearest

FREQUENCIES = ("r", "c", "f")
DETECTIONS, LVIS_DETECTIONS = (1, 10, 100), (300,)
RARE, COMMON = 10, 100  # LVIS (Gupta et al. 2019, section 4.1): classes of at most so many training images


class _Options(NamedTuple):
    """What two accumulators must have in common to be merged."""

    class_names: tuple[str, ...]
    masks: bool
    max_detections: tuple[int, ...]
    frequencies: tuple[str, ...] | None


class CocoMetric:
    """The figures of COCO (Lin et al. 2014), for boxes and, with ``masks=True``, for masks too.

    Give each image its objects by ``add_truth`` (also an image without any) and what was found in it by
    ``add_detections`` or, for a batch, ``update`` (an image where nothing was found needs neither). Boxes are xyxy in
    pixels of the original image, labels are indices into ``class_names``. Masks are turned into run lengths one by
    one as they arrive; none is kept at full resolution.

    ``max_detections``: at most the last of them count in an image for each class, and AR is reported for each of
    them. ``frequencies`` ("r", "c" or "f" for each class, see ``frequency_groups``) asks for the rules of LVIS (Gupta
    et al. 2019): a class counts only in images that hold it or for which it is named ``negative``, unmatched
    detections of ``not_exhaustive`` classes are neither right nor wrong, an image gives its best 300 detections over
    all classes, and AP is reported for rare, common and frequent classes.

    Do not remove detections of low score before: AP counts them. Raises ValueError for options that do not fit.
    """

    def __init__(
        self,
        class_names: Iterable[str],
        *,
        masks: bool = False,
        max_detections: Iterable[int] | None = None,
        frequencies: Iterable[str] | None = None,
    ) -> None:
        groups = None if frequencies is None else tuple(frequencies)
        usual = DETECTIONS if groups is None else LVIS_DETECTIONS
        counts = usual if max_detections is None else tuple(max_detections)
        self._options = _Options(tuple(class_names), masks, counts, groups)
        _check_options(self._options)
        self._truths: dict[int, Truth] = {}
        self._found: dict[int, Found] = {}

    def __len__(self) -> int:
        """The number of images whose objects are known."""
        return len(self._truths)

    def add_truth(
        self,
        image_id: int,
        boxes: Num[np.ndarray, "n 4"],
        labels: Int[np.ndarray, " n"],
        *,
        area: Num[np.ndarray, " n"] | None = None,
        crowd: Num[np.ndarray, " n"] | Bool[np.ndarray, " n"] | None = None,
        masks: Iterable[Any] | None = None,
        negative: Iterable[int] | Int[np.ndarray, " _"] = (),
        not_exhaustive: Iterable[int] | Int[np.ndarray, " _"] = (),
    ) -> None:
        """The objects of one image.

        ``area`` decides what is small, medium and large; COCO's annotations give it (that of the mask, also where
        boxes are judged). Without it, it is that of the mask, or else of the box. ``crowd`` is 1 for a region of many
        objects, on which detections are neither right nor wrong. ``masks`` are [h w] arrays or run lengths as COCO
        writes them, ``{"size": [h, w], "counts": ...}``. ``negative`` and ``not_exhaustive`` are classes of this
        image under the rules of LVIS.

        Raises ValueError for an image that was given before, and for what does not fit: shapes, labels, boxes that
        are not finite or whose corners are swapped, masks that are missing.
        """
        if image_id in self._truths:
            raise ValueError(f"the objects of image {image_id} were given before; expected each image once.")
        _check_rows(image_id, "objects", boxes, labels, len(self._options.class_names))
        if (boxes[:, 2:] < boxes[:, :2]).any():
            row = int(np.flatnonzero((boxes[:, 2:] < boxes[:, :2]).any(axis=1))[0])
            raise ValueError(
                f"image {image_id}: box {row} is {boxes[row].tolist()}, whose second corner lies before the first; "
                "expected xyxy in pixels (COCO files have x, y, width, height)."
            )
        lengths = self._encoded(image_id, masks, len(labels), "objects")
        sizes = _areas(boxes, lengths) if area is None else np.asarray(area, np.float64)
        crowds = np.zeros(len(labels), bool) if crowd is None else np.asarray(crowd) != 0
        _check_count(image_id, "area", len(sizes), len(labels))
        _check_count(image_id, "crowd", len(crowds), len(labels))
        lists = self._federated(image_id, negative), self._federated(image_id, not_exhaustive)
        self._truths[int(image_id)] = Truth(_float(boxes), np.array(labels), sizes, crowds, lengths, *lists)

    def add_detections(
        self,
        image_id: int,
        boxes: Float[np.ndarray, "n 4"],
        scores: Float[np.ndarray, " n"],
        labels: Int[np.ndarray, " n"],
        *,
        masks: Iterable[Any] | None = None,
    ) -> None:
        """What was found in one image; where scores are equal, the first counts as the better.

        ``masks`` are [h w] arrays of 0 and 1, or run lengths, at the size of the original image; an iterator that
        makes them one at a time keeps memory small. Raises ValueError for an image that was given before, and for
        what does not fit: shapes, labels, numbers that are not finite, masks that are missing.
        """
        if image_id in self._found:
            raise ValueError(
                f"detections of image {image_id} were given before; expected each image once. Rows that only pad a "
                "batch need weight 0."
            )
        _check_rows(image_id, "detections", boxes, labels, len(self._options.class_names))
        _check_count(image_id, "scores", len(scores), len(labels))
        if not np.isfinite(scores).all():
            raise ValueError(f"image {image_id}: a score is not finite; detections cannot be ranked.")
        lengths = self._encoded(image_id, masks, len(labels), "detections")
        self._found[int(image_id)] = Found(_float(boxes), _float(scores), np.array(labels), lengths)

    def update(
        self,
        image_ids: Int[np.ndarray, " b"],
        boxes: Float[np.ndarray, "b n 4"],
        scores: Float[np.ndarray, "b n"],
        labels: Int[np.ndarray, "b n"],
        *,
        valid: Bool[np.ndarray, "b n"] | None = None,
        weights: Num[np.ndarray, " b"] | None = None,
        masks: Iterable[Iterable[Any]] | None = None,
    ) -> None:
        """``add_detections`` for a batch: rows that are not ``valid`` and images of weight 0 are dropped unread.

        ``masks`` gives for each image in turn those of its valid rows; it may be an iterator that makes them when
        they are asked for, and is asked for images of weight 0 too. Raises what ``add_detections`` raises, and
        ValueError for masks of fewer images.
        """
        used = np.ones(len(image_ids), bool) if weights is None else np.asarray(weights) != 0
        rows = np.ones(scores.shape, bool) if valid is None else valid
        for i, of_image in enumerate(_for_each(masks, len(image_ids))):
            if used[i]:
                kept = rows[i]
                given = boxes[i][kept], scores[i][kept], labels[i][kept]
                self.add_detections(int(image_ids[i]), *given, masks=of_image)

    def merge(self, other: "CocoMetric") -> "CocoMetric":
        """A new accumulator over the images of both.

        An image in both, as where hosts pad their share of the data with images of others, counts once: what
        ``self`` has of it stays. Raises ValueError where the options differ, or the objects of such an image.
        """
        _check_same(self._options, other._options)
        for image_id in self._truths.keys() & other._truths.keys():
            if not np.array_equal(self._truths[image_id].boxes, other._truths[image_id].boxes):
                raise ValueError(f"the two metrics to merge have different objects for image {image_id}.")
        return self._holding({**other._truths, **self._truths}, {**other._found, **self._found})

    def merge_hosts(self) -> "CocoMetric":
        """On each host, one accumulator over the images of all; every host must call it."""
        merged = self._holding({}, {})
        for state in all_hosts(pickle.dumps((self._options, self._truths, self._found))):
            options, truths, found = pickle.loads(state)
            _check_same(self._options, options)
            merged = merged.merge(self._holding(truths, found))
        return merged

    def _holding(self, truths: dict[int, Truth], found: dict[int, Found]) -> "CocoMetric":
        """A new accumulator with the same options."""
        names, masks, counts, groups = self._options
        made = CocoMetric(names, masks=masks, max_detections=counts, frequencies=groups)
        made._truths, made._found = truths, found
        return made

    def evaluate(self, kind: str = "boxes") -> CocoResult:
        """Figures, curves and the AP of each class, for ``"boxes"`` or ``"masks"``.

        Raises ValueError for no image, for detections of images whose objects were not given, and for masks that the
        metric was not asked to keep; ImportError, naming the extra, where faster-coco-eval is not installed.
        """
        if kind not in KINDS:
            raise nearest(kind, list(KINDS), "kind of COCO figures")
        if kind == "masks" and not self._options.masks:
            raise ValueError("masks were not kept; expected CocoMetric(..., masks=True).")
        options = self._options
        return coco_result(
            self._records(), options.class_names, KINDS[kind], options.max_detections, options.frequencies
        )

    def compute(self) -> dict[str, float]:
        """AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, from 0 to 1; ``mask_AP`` ... for masks.

        NaN where no object of that size exists (pycocotools writes -1). With ``frequencies`` also APr, APc and APf.
        Raises what ``evaluate`` raises.
        """
        figures = self.evaluate("boxes").figures
        if self._options.masks:
            figures = {**figures, **{f"mask_{name}": value for name, value in self.evaluate("masks").figures.items()}}
        return figures

    def _records(self) -> dict[int, ImageRecord]:
        """What is known of each image, by ascending id: equal scores of different images rank in this order."""
        unknown = sorted(self._found.keys() - self._truths.keys())
        if unknown or not self._truths:
            raise ValueError(
                f"detections of {len(unknown)} images were given and their objects not (first: {unknown[:5]}); call "
                "add_truth for each image, with empty arrays where it holds no object."
                if unknown
                else "COCO figures of no image; call add_truth for each image."
            )
        return {i: ImageRecord(self._truths[i], self._limited(self._found.get(i))) for i in sorted(self._truths)}

    def _limited(self, found: Found | None) -> Found | None:
        """LVIS cuts over all classes, COCO for each class (which faster-coco-eval does)."""
        most = self._options.max_detections[-1]
        if found is None or self._options.frequencies is None or len(found.scores) <= most:
            return found
        kept = np.argsort(-found.scores, kind="stable")[:most]
        masks = None if found.masks is None else tuple(found.masks[i] for i in kept)
        return Found(found.boxes[kept], found.scores[kept], found.labels[kept], masks)

    def _encoded(
        self, image_id: int, masks: Iterable[Any] | None, count: int, what: str
    ) -> tuple[Mapping[str, Any], ...] | None:
        if not self._options.masks:
            return None
        if masks is None and count:
            raise ValueError(f"image {image_id}: {what} without masks; CocoMetric(..., masks=True) needs them.")
        lengths = tuple(encode_mask(mask) for mask in masks or ())
        _check_count(image_id, "masks", len(lengths), count)
        return lengths

    def _federated(self, image_id: int, labels: Iterable[int] | Int[np.ndarray, " _"]) -> tuple[int, ...]:
        given = tuple(int(label) for label in labels)
        if given and self._options.frequencies is None:
            raise ValueError(
                f"image {image_id}: negative and not_exhaustive belong to the rules of LVIS; give "
                "CocoMetric(..., frequencies=...)."
            )
        _check_labels(image_id, np.array(given, np.int64), len(self._options.class_names))
        return given


def frequency_groups(image_counts: Int[np.ndarray, " k"]) -> tuple[str, ...]:
    """LVIS's group of each class by the number of training images that hold it: "r" to 10, "c" to 100, else "f"."""
    return tuple("r" if count <= RARE else "c" if count <= COMMON else "f" for count in image_counts)


def _for_each(masks: Iterable[Iterable[Any]] | None, count: int) -> Iterator[Iterable[Any] | None]:
    given = iter([None] * count if masks is None else masks)
    for number in range(count):
        try:
            yield next(given)
        except StopIteration:
            raise ValueError(
                f"masks end after {number} of {count} images; expected those of each image, also of weight 0."
            ) from None


def all_hosts(state: bytes) -> list[bytes]:
    """The bytes of every host, in their order. What is gathered must have one shape, so the shorter are padded."""
    from jax.experimental.multihost_utils import process_allgather

    lengths = np.asarray(process_allgather(np.array([len(state)], np.int32))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(state)] = np.frombuffer(state, np.uint8)
    rows = np.asarray(process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def _areas(boxes: np.ndarray, masks: tuple[Mapping[str, Any], ...] | None) -> Float[np.ndarray, " n"]:
    if masks is not None:
        return np.array([mask_area(mask) for mask in masks], np.float64)
    sides = _float(boxes)[:, 2:] - _float(boxes)[:, :2]
    return sides[:, 0] * sides[:, 1]


def _float(values: np.ndarray) -> np.ndarray:
    """A copy in float64, in which the figures are computed."""
    return np.array(values, np.float64)


def _check_same(ours: _Options, theirs: _Options) -> None:
    for name, one, other in zip(_Options._fields, ours, theirs, strict=True):
        if one != other:
            raise ValueError(f"{name} differs between the two metrics to merge: {one} and {other}.")


def _check_options(options: _Options) -> None:
    counts, groups = options.max_detections, options.frequencies
    if not options.class_names:
        raise ValueError("class_names is empty; expected the name of each class.")
    if not counts or list(counts) != sorted(set(counts)) or counts[0] < 1:
        raise ValueError(f"max_detections is {counts}; expected ascending numbers from 1, such as {DETECTIONS}.")
    if groups is not None and (len(groups) != len(options.class_names) or set(groups) - set(FREQUENCIES)):
        raise ValueError(
            f"frequencies has {len(groups)} entries {sorted(set(groups))} for {len(options.class_names)} classes; "
            "expected 'r', 'c' or 'f' for each class."
        )


def _check_rows(image_id: int, what: str, boxes: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) != len(labels):
        raise ValueError(
            f"image {image_id}: {what} have boxes {boxes.shape} and labels {labels.shape}; expected [n 4] and [n]."
        )
    if not np.isfinite(boxes).all():
        raise ValueError(f"image {image_id}: the boxes of its {what} are not all finite.")
    _check_labels(image_id, labels, num_classes)


def _check_labels(image_id: int, labels: np.ndarray, num_classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.size:
        raise ValueError(
            f"image {image_id}: label {int(wrong[0])} among {num_classes} classes; expected 0 to {num_classes - 1} "
            "(labels are indices into class_names, not the category ids of a file)."
        )


def _check_count(image_id: int, name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"image {image_id}: {found} {name} for {expected} labels; expected one each.")
