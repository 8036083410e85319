"""Panoptic quality (Kirillov et al. 2019), and the ids of segments in COCO's panoptic PNG files."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

VOID = 0  # the id of pixels that belong to no segment


class Segment(NamedTuple):
    """One segment of an image: its id in the map, its class, and whether it is a crowd (only in the truth)."""

    id: int
    label: int
    crowd: bool = False


class PanopticQuality:
    """Sums of overlaps and counts for each class; each image counts once.

    A predicted and a true segment match where their classes are equal and their overlap (intersection over union, the
    union without pixels that are void in the truth) is over 0.5; then both have no other match. A crowd is never
    matched nor missed. A segment without a match is not wrong where more than half of it lies on void and on crowds of
    its class.

    As in panopticapi, except where an image holds several crowds of one class: there only the last one counts.
    """

    def __init__(self, class_names: Iterable[str], things: Bool[np.ndarray, " k"]) -> None:
        """``things`` says which classes are countable. Raises ValueError where its length is not that of the names."""
        self.class_names, self.things = tuple(class_names), np.array(things)
        if len(self.class_names) != len(self.things):
            raise ValueError(f"things has {len(self.things)} entries for {len(self.class_names)} classes.")
        self._overlap = np.zeros(len(self.things), np.float64)
        self._matched, self._wrong, self._missed = (np.zeros(len(self.things), np.int64) for _ in range(3))

    def update(
        self,
        predicted: Int[np.ndarray, "h w"],
        predicted_segments: Sequence[Segment],
        truth: Int[np.ndarray, "h w"],
        truth_segments: Sequence[Segment],
    ) -> None:
        """Add one image: maps of segment ids, 0 where there is none, and what each id stands for.

        Raises ValueError for maps of different shapes, ids that occur in the map and not in the list or the other
        way round, ids that are given twice or are not positive, and labels out of range.
        """
        if predicted.shape != truth.shape:
            raise ValueError(f"the predicted map is {predicted.shape}, the true one {truth.shape}; expected one shape.")
        found = self._described("predicted", predicted, predicted_segments)
        real = self._described("true", truth, truth_segments)
        shared = _intersections(predicted, truth)
        areas = _totals(shared, 0)
        matches = list(_matches(found, real, shared))
        for a, b, overlap in matches:
            self._overlap[found[a].label] += overlap
            self._matched[real[b].label] += 1
        for segment in _unmatched(real, {b for _, b, _ in matches}):
            self._missed[segment.label] += not segment.crowd
        for segment in _unmatched(found, {a for a, _, _ in matches}):
            self._wrong[segment.label] += not _excused(segment, real, shared, areas[segment.id])

    def merge(self, other: "PanopticQuality") -> "PanopticQuality":
        """A new accumulator over the images of both. Raises ValueError where their classes differ."""
        if self.class_names != other.class_names or not np.array_equal(self.things, other.things):
            raise ValueError("the two metrics to merge have different classes, or differ in which of them are things.")
        merged = PanopticQuality(self.class_names, self.things)
        merged._overlap = self._overlap + other._overlap
        merged._matched = self._matched + other._matched
        merged._wrong = self._wrong + other._wrong
        merged._missed = self._missed + other._missed
        return merged

    def per_class(self) -> dict[str, Float[np.ndarray, " k"]]:
        """PQ, SQ and RQ of each class, from 0 to 1; NaN for a class without segments. SQ is 0 without a match."""
        total = self._matched + 0.5 * (self._wrong + self._missed)
        seen = total > 0
        quality = np.divide(self._overlap, total, out=np.full(len(total), np.nan), where=seen)
        recognition = np.divide(self._matched, total, out=np.full(len(total), np.nan), where=seen)
        segmentation = np.divide(self._overlap, np.maximum(self._matched, 1))
        return {"PQ": quality, "SQ": np.where(seen, segmentation, np.nan), "RQ": recognition}

    def compute(self) -> dict[str, float]:
        """Means of PQ, SQ and RQ over the classes that have segments; also as PQ_th ... (things), PQ_st ... (stuff).

        NaN where there is no such class.
        """
        classes = self.per_class()
        groups = {"": np.ones(len(self.things), bool), "_th": self.things, "_st": ~self.things}
        return {
            name + suffix: _mean(values[chosen])
            for suffix, chosen in groups.items()
            for name, values in classes.items()
        }

    def _described(self, what: str, ids: np.ndarray, segments: Sequence[Segment]) -> dict[int, Segment]:
        by_id = {segment.id: segment for segment in segments}
        if len(by_id) != len(segments) or any(number <= VOID for number in by_id):
            raise ValueError(f"ids of the {what} segments are {[s.id for s in segments]}; expected each once, from 1.")
        present = set(np.unique(ids).tolist()) - {VOID}
        if present != set(by_id):
            raise ValueError(
                f"the {what} map and its list of segments disagree: only in the map {sorted(present - set(by_id))}, "
                f"only in the list {sorted(set(by_id) - present)}."
            )
        for segment in segments:
            if not 0 <= segment.label < len(self.things):
                raise ValueError(
                    f"{what} segment {segment.id} has label {segment.label} among {len(self.things)} classes; expected "
                    f"0 to {len(self.things) - 1}."
                )
        return by_id


def _intersections(predicted: np.ndarray, truth: np.ndarray) -> dict[tuple[int, int], int]:
    """Pixels by predicted and true id, as far as there are any."""
    stride = int(truth.max(initial=0)) + 1
    pairs, counts = np.unique(predicted.astype(np.int64) * stride + truth, return_counts=True)
    return {divmod(pair, stride): count for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)}


def _matches(
    found: dict[int, Segment], real: dict[int, Segment], shared: dict[tuple[int, int], int]
) -> Iterable[tuple[int, int, float]]:
    """Predicted id, true id and overlap; over 0.5, so that no id can occur twice."""
    found_area, real_area = _totals(shared, 0), _totals(shared, 1)
    for (a, b), pixels in shared.items():
        if a == VOID or b == VOID or real[b].crowd or found[a].label != real[b].label:
            continue
        overlap = pixels / (found_area[a] + real_area[b] - pixels - shared.get((a, VOID), 0))
        if overlap > 0.5:
            yield a, b, overlap


def _totals(shared: dict[tuple[int, int], int], side: int) -> dict[int, int]:
    totals: dict[int, int] = {}
    for pair, pixels in shared.items():
        totals[pair[side]] = totals.get(pair[side], 0) + pixels
    return totals


def _unmatched(segments: dict[int, Segment], matched: set[int]) -> list[Segment]:
    return [segment for number, segment in segments.items() if number not in matched]


def _excused(segment: Segment, real: dict[int, Segment], shared: dict[tuple[int, int], int], area: int) -> bool:
    crowds = [number for number, other in real.items() if other.crowd and other.label == segment.label]
    return sum(shared.get((segment.id, number), 0) for number in (VOID, *crowds)) / area > 0.5


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def rgb_to_ids(pixels: UInt8[np.ndarray, "h w 3"]) -> Int[np.ndarray, "h w"]:
    """Segment ids of a panoptic PNG file: red + 256 green + 65536 blue."""
    red, green, blue = np.moveaxis(pixels.astype(np.int32), -1, 0)
    return red + 256 * green + 65536 * blue


def ids_to_rgb(ids: Int[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels that ``rgb_to_ids`` reads. Raises ValueError for ids outside 0 to 16777215."""
    if ids.size and (ids.min() < 0 or ids.max() >= 256**3):
        raise ValueError(f"segment ids reach from {ids.min()} to {ids.max()}; expected 0 to {256**3 - 1}.")
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
