"""From gathered objects and detections to COCO's figures, by faster-coco-eval (extra [coco]), and its run lengths."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Rle = Mapping[str, Any]  # {"size": [h, w], "counts": bytes}: COCO's run lengths, column by column

KINDS = {"boxes": "bbox", "masks": "segm"}  # our name, and that of the library
AREAS = {"": "all", "s": "small", "m": "medium", "l": "large"}  # sides of 32 and 96 pixels part them
THRESHOLDS = {"": None, "50": 0.5, "75": 0.75}  # intersection over union; without: the mean of 0.50, 0.55 ... 0.95
GROUPS = ("r", "c", "f")


class Truth(NamedTuple):
    """The objects of one image, and the classes that LVIS treats apart in it."""

    boxes: Float[np.ndarray, "n 4"]
    labels: Int[np.ndarray, " n"]
    area: Float[np.ndarray, " n"]
    crowd: Bool[np.ndarray, " n"]
    masks: tuple[Rle, ...] | None
    negative: tuple[int, ...]
    not_exhaustive: tuple[int, ...]


class Found(NamedTuple):
    """The detections of one image."""

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    masks: tuple[Rle, ...] | None


class ImageRecord(NamedTuple):
    truth: Truth
    found: Found | None


class CocoResult(NamedTuple):
    """Figures by name, and what they are means of; NaN where no object counts.

    ``precision`` is what is reached at each recall of ``recalls`` or beyond, for each overlap of ``thresholds`` and
    each class, over objects of all sizes.
    """

    figures: dict[str, float]
    class_names: tuple[str, ...]
    objects: Int[np.ndarray, " k"]  # of each class, without crowds
    precision: Float[np.ndarray, "t r k"]
    thresholds: Float[np.ndarray, " t"]
    recalls: Float[np.ndarray, " r"]

    def class_ap(self, threshold: float | None = None) -> Float[np.ndarray, " k"]:
        """AP of each class, over all thresholds or at one of them; NaN for a class without objects.

        Raises ValueError for a threshold at which nothing was computed.
        """
        return self.curves(threshold).mean(axis=0)

    def curves(self, threshold: float | None = None) -> Float[np.ndarray, "r k"]:
        """Precision over ``recalls`` for each class, at one threshold or as the mean over all."""
        if threshold is None:
            return self.precision.mean(axis=0)
        rows = np.flatnonzero(np.isclose(self.thresholds, threshold))
        if not rows.size:
            raise ValueError(f"threshold is {threshold}; expected one of {np.round(self.thresholds, 2).tolist()}.")
        return self.precision[rows[0]]

    def table(self) -> str:
        """Lines of class, number of objects, AP, AP50 and AP75 in percent, best first, those without objects last."""
        columns = self.class_ap(), self.class_ap(0.5), self.class_ap(0.75)
        width = max(len("class"), *map(len, self.class_names))
        lines = [f"{'class':<{width}}  {'objects':>7}  {'AP':>5}  {'AP50':>5}  {'AP75':>5}"]
        for k in np.argsort(-np.nan_to_num(columns[0], nan=-1.0), kind="stable"):
            numbers = "  ".join("    -" if np.isnan(column[k]) else f"{100 * column[k]:5.1f}" for column in columns)
            lines.append(f"{self.class_names[k]:<{width}}  {self.objects[k]:>7}  {numbers}")
        return "\n".join(lines)


def coco_result(
    records: Mapping[int, ImageRecord],
    class_names: tuple[str, ...],
    kind: str,
    max_detections: tuple[int, ...],
    frequencies: tuple[str, ...] | None,
) -> CocoResult:
    """Evaluate; ``kind`` is "bbox" or "segm". With ``frequencies`` by the rules of LVIS."""
    library = _library()
    objects = library.COCO(_dataset(records, class_names, frequencies, kind))
    detections = objects.loadRes(_detections(records, kind))
    run = library.COCOeval_faster(objects, detections, kind, lvis_style=frequencies is not None)
    run.params.maxDets = list(max_detections)
    run.evaluate()
    run.accumulate()
    precision, recall = (_known(run.eval[name]) for name in ("precision", "recall"))
    figures = _figures(precision, recall, run.params.iouThrs, max_detections, frequencies)
    counts = _object_counts(records, len(class_names))
    kept = precision[:, :, :, 0, -1]
    return CocoResult(figures, class_names, counts, kept, run.params.iouThrs, run.params.recThrs)


def encode_mask(mask: Any) -> Rle:
    """Run lengths of an [h w] array of 0 and 1; run lengths as COCO writes them, compressed or not, are taken too.

    Raises ValueError for another shape or other values, ImportError where faster-coco-eval is not installed.
    """
    library = _library().mask
    if isinstance(mask, Mapping):
        size = [int(side) for side in mask["size"]]
        counts = mask["counts"]
        if isinstance(counts, bytes | str):
            return {"size": size, "counts": counts.encode() if isinstance(counts, str) else counts}
        return library.frPyObjects({"size": size, "counts": [int(count) for count in counts]}, *size)
    pixels = np.asarray(mask)
    if pixels.ndim != 2 or not (pixels.dtype == bool or np.isin(pixels, (0, 1)).all()):
        raise ValueError(
            f"a mask is {pixels.dtype} of shape {pixels.shape}; expected an [h w] array of 0 and 1, or run lengths "
            '{"size": [h, w], "counts": ...}.'
        )
    return library.encode(np.asfortranarray(pixels, dtype=np.uint8))


def mask_area(mask: Rle) -> float:
    """The number of pixels of run lengths from ``encode_mask``."""
    return float(_library().mask.area([dict(mask)])[0])


def _library() -> Any:
    try:
        import faster_coco_eval
    except ImportError as error:
        raise ImportError(f"COCO figures need faster-coco-eval ({error}): pip install 'eqvision[coco]'") from error
    return faster_coco_eval


# What the library reads: lists of dicts, ids from 1 (0 means "unmatched" to it)


def _dataset(
    records: Mapping[int, ImageRecord],
    class_names: tuple[str, ...],
    frequencies: tuple[str, ...] | None,
    kind: str,
) -> dict[str, Any]:
    groups = frequencies or [None] * len(class_names)
    categories = [
        {"id": k + 1, "name": name, "frequency": group}
        for k, (name, group) in enumerate(zip(class_names, groups, strict=True))
    ]
    annotations = [row for i, record in records.items() for row in _annotations(i, record.truth, kind)]
    for number, row in enumerate(annotations):
        row["id"] = number + 1
    return {
        "images": [_image(i, record) for i, record in records.items()],
        "categories": categories,
        "annotations": annotations,
    }


def _image(image_id: int, record: ImageRecord) -> dict[str, Any]:
    masks = (record.truth.masks or ()) + ((record.found.masks or ()) if record.found else ())
    sizes = {tuple(mask["size"]) for mask in masks}
    if len(sizes) > 1:
        raise ValueError(
            f"image {image_id}: its masks are of different sizes (height, width): {sorted(sizes)}; expected all at the "
            "size of the original image."
        )
    height, width = sizes.pop() if sizes else (1, 1)  # read only where there are masks
    return {
        "id": image_id,
        "height": height,
        "width": width,
        "neg_category_ids": [label + 1 for label in record.truth.negative],
        "not_exhaustive_category_ids": [label + 1 for label in record.truth.not_exhaustive],
    }


def _annotations(image_id: int, truth: Truth, kind: str) -> list[dict[str, Any]]:
    rows = zip(_xywh(truth.boxes), truth.labels.tolist(), truth.area.tolist(), truth.crowd.tolist(), strict=True)
    made = [
        {"image_id": image_id, "category_id": label + 1, "bbox": box, "area": area, "iscrowd": int(crowd)}
        for box, label, area, crowd in rows
    ]
    return _with_masks(made, truth.masks) if kind == "segm" else made


def _detections(records: Mapping[int, ImageRecord], kind: str) -> list[dict[str, Any]]:
    """Masks go without boxes, so that their size is judged by the mask's area."""
    made: list[dict[str, Any]] = []
    for image_id, (_, found) in records.items():
        if found is None:
            continue
        rows: list[dict[str, Any]] = [
            {"image_id": image_id, "category_id": label + 1, "score": score}
            for label, score in zip(found.labels.tolist(), found.scores.tolist(), strict=True)
        ]
        if kind == "segm":
            made += _with_masks(rows, found.masks)
        else:
            made += [{**row, "bbox": box} for row, box in zip(rows, _xywh(found.boxes), strict=True)]
    return made


def _with_masks(rows: list[dict[str, Any]], masks: tuple[Rle, ...] | None) -> list[dict[str, Any]]:
    return [{**row, "segmentation": dict(mask)} for row, mask in zip(rows, masks or (), strict=True)]


def _xywh(boxes: Float[np.ndarray, "n 4"]) -> list[list[float]]:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()


def _object_counts(records: Mapping[int, ImageRecord], num_classes: int) -> Int[np.ndarray, " k"]:
    counts = np.zeros(num_classes, np.int64)
    for record in records.values():
        np.add.at(counts, record.truth.labels[~record.truth.crowd], 1)
    return counts


# What the library gives: arrays over threshold, recall, class, area, number of detections


def _known(values: np.ndarray) -> np.ndarray:
    """The library's -1, for a class without objects that count, as NaN."""
    values = np.asarray(values)
    return np.where(values > -1, values, np.nan)


def _figures(
    precision: Float[np.ndarray, "t r k a m"],
    recall: Float[np.ndarray, "t k a m"],
    thresholds: Float[np.ndarray, " t"],
    max_detections: tuple[int, ...],
    frequencies: tuple[str, ...] | None,
) -> dict[str, float]:
    best = precision[..., -1]
    figures = {f"AP{name}": _mean(best[_rows(thresholds, value), :, :, 0]) for name, value in THRESHOLDS.items()}
    sizes = {name: a for a, name in enumerate(AREAS) if name}
    figures |= {f"AP{name}": _mean(best[:, :, :, a]) for name, a in sizes.items()}
    if frequencies is not None:
        groups = np.array(frequencies)
        figures |= {f"AP{group}": _mean(best[:, :, groups == group, 0]) for group in GROUPS}
    figures |= {f"AR{count}": _mean(recall[:, :, 0, m]) for m, count in enumerate(max_detections)}
    return figures | {f"AR{name}": _mean(recall[:, :, a, -1]) for name, a in sizes.items()}


def _rows(thresholds: Float[np.ndarray, " t"], value: float | None) -> Bool[np.ndarray, " t"]:
    return np.ones(len(thresholds), bool) if value is None else thresholds == value


def _mean(values: np.ndarray) -> float:
    """Over what is known, in the order of pycocotools, so that the last digit agrees."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
