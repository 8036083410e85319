"""COCO instances JSON -> columns. Every row is checked once, here, and errors name the file, the row and its id."""

import contextlib
import gc
import json
import logging
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from eqvision.data.detection.index import (
    COMPRESSED,
    EMPTY,
    NONE,
    POLYGONS,
    UNCOMPRESSED,
    CocoIndex,
    Ragged,
    SegmentationColumns,
)
from eqvision.data.packed import pack_strings

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


def parse_coco(file: Path) -> CocoIndex:
    """Read and check a COCO instances file (format: https://cocodataset.org/#format-data).

    Categories are sorted by id, which need not be contiguous; images by id; annotations stay in order within their
    image. ``iscrowd`` and ``segmentation`` may be missing, and so may ``area`` (then that of the box is taken, with
    a warning). LVIS files, which have ``coco_url`` in place of ``file_name``, are read too. Raises ValueError.
    """
    content = _load(file)
    images, annotations, categories = (_rows(content, key, file) for key in ("images", "annotations", "categories"))
    reader = _Reader(file)
    category_ids, class_names, frequencies = reader.categories(categories)
    image_ids, images = reader.by_id(images, "images")
    owners = reader.positions(annotations, "image_id", image_ids, "images")
    order = np.argsort(owners, kind="stable")
    annotations, owners = reader.reorder(annotations, order, "annotations"), owners[order]
    heights, widths = (reader.sizes(images, key) for key in ("height", "width"))
    boxes = reader.boxes(annotations)
    segmentations, num_degenerate = reader.segmentations(annotations)
    _check_mask_sizes(file, segmentations, annotations, np.stack([heights, widths], 1)[owners])
    area, num_missing = reader.areas(annotations, boxes)
    return CocoIndex(
        image_ids=image_ids,
        heights=heights,
        widths=widths,
        file_names=pack_strings(reader.file_name(row, place) for place, row in enumerate(images)),
        last=np.searchsorted(owners, np.arange(len(images)), side="right").astype(np.int64),
        annotation_ids=_annotation_ids(reader, annotations, order),
        labels=reader.positions(annotations, "category_id", category_ids, "categories").astype(np.int32),
        boxes_xywh=boxes,
        area=area,
        iscrowd=np.array([bool(row.get("iscrowd")) for row in annotations], bool),
        segmentations=segmentations,
        negative=reader.label_lists(images, "neg_category_ids", category_ids),
        not_exhaustive=reader.label_lists(images, "not_exhaustive_category_ids", category_ids),
        category_ids=category_ids,
        class_names=class_names,
        frequencies=frequencies,
        notes={"area": num_missing, "polygons": num_degenerate},
    )


def _annotation_ids(reader: "_Reader", rows: Rows, order: np.ndarray) -> np.ndarray:
    """Those of the file; where it has none at all, the places in it counted from 1."""
    if not any("id" in row for row in rows):
        return order.astype(np.int64) + 1
    return reader.whole_numbers(rows, "id", "annotations")


# The file


def _load(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    if size > 50e6:
        log.info("reading %s (%d MB); the next time it will be in the cache", file, size // 1_000_000)
    try:
        with _without_collection():
            content = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        hint = "; a list is what files of detections are" if isinstance(content, list) else ""
        raise ValueError(f"{file} holds a {type(content).__name__}; expected an object with {_KEYS}{hint}")
    return content


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Millions of new objects of which none is garbage: looking through them again and again doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_KEYS = '"images", "annotations" and "categories"'


def _rows(content: dict[str, Any], key: str, file: Path) -> Rows:
    rows = content.get(key, [] if key == "annotations" else None)
    if not isinstance(rows, list):
        what = f"{key!r} is a {type(rows).__name__}" if key in content else f"no {key!r}, only {sorted(content)[:8]}"
        raise ValueError(f"{file}: {what}; expected lists {_KEYS}")
    for place, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{file}: {key}[{place}] is {_short(row)}; expected an object")
    if not rows and key != "annotations":
        raise ValueError(f"{file}: {key!r} is empty")
    if key == "annotations" and rows and "segments_info" in rows[0]:
        raise ValueError(f"{file} holds panoptic annotations (segments_info); expected instances, with bbox")
    return rows


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Reader:
    """Columns of rows, checked; ``file`` begins every message."""

    def __init__(self, file: Path):
        self.file = file
        self._places: dict[str, np.ndarray] = {}  # in the file, of rows that have been sorted

    def reorder(self, rows: Rows, order: np.ndarray, table: str) -> Rows:
        """The rows in another order; messages keep to the places in the file."""
        self._places[table] = order
        return [rows[place] for place in order.tolist()]

    def wrong(self, rows: Rows, place: int, key: str, table: str, expected: str) -> ValueError:
        """The error for one value."""
        row = rows[place]
        name = f" (id {_short(row['id'])})" if "id" in row and key != "id" else ""
        found = f"{key} {_short(row[key])}" if key in row else f"no {key!r}"
        place = self._places[table][place] if table in self._places else place
        return ValueError(f"{self.file}: {table}[{place}]{name} has {found}; expected {expected}")

    def whole_numbers(self, rows: Rows, key: str, table: str) -> np.ndarray:
        """A column of integers; 3.0 is one too."""
        values = [row.get(key) for row in rows]
        if set(map(type, values)) == {int} and np.array(values).dtype == np.int64:  # nearly always; and quick
            return np.array(values)
        for place, value in enumerate(values):
            whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            if not whole or isinstance(value, bool) or not -(2**63) <= cast(int, value) < 2**63:
                raise self.wrong(rows, place, key, table, "a whole number")
        return np.array(values, np.int64)

    def by_id(self, rows: Rows, table: str) -> tuple[np.ndarray, Rows]:
        """Ids and rows, sorted by id."""
        ids = self.whole_numbers(rows, "id", table)
        order = np.argsort(ids, kind="stable")
        same = np.flatnonzero(np.diff(ids[order]) == 0)
        if same.size:
            first, second = (int(order[same[0] + step]) for step in (0, 1))
            raise ValueError(
                f"{self.file}: id {ids[first]} comes twice, in {table}[{first}] and {table}[{second}]; expected once"
            )
        return ids[order], self.reorder(rows, order, table)

    def categories(self, rows: Rows) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...] | None]:
        """Ids, names, and LVIS's frequencies, which are None where any is missing."""
        ids, rows = self.by_id(rows, "categories")
        for place, row in enumerate(rows):
            if not isinstance(row.get("name"), str):
                raise self.wrong(rows, place, "name", "categories", "a text")
        groups = tuple(str(row.get("frequency")) for row in rows)
        known = all(each in ("r", "c", "f") for each in groups)
        return ids, tuple(row["name"] for row in rows), groups if known else None

    def positions(self, rows: Rows, key: str, ids: np.ndarray, table: str) -> np.ndarray:
        """Where the ids in a column stand in the sorted ``ids``."""
        wanted = self.whole_numbers(rows, key, "annotations")
        found = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
        unknown = np.flatnonzero(ids[found] != wanted)
        if unknown.size:
            shown = ", ".join(map(str, ids[:5])) + (f", ... ({len(ids)})" if len(ids) > 5 else "")
            expected = f"an id of {table!r}: {shown} ({unknown.size} such annotations)"
            raise self.wrong(rows, int(unknown[0]), key, "annotations", expected)
        return found

    def label_lists(self, rows: Rows, key: str, ids: np.ndarray) -> Ragged:
        """Lists of category ids, as labels; empty where a row has none."""
        values: list[Any] = []
        known = set(ids.tolist())
        ends = array("q")
        for place, row in enumerate(rows):
            own = row.get(key) or []
            if not isinstance(own, list) or not all(isinstance(each, int) and each in known for each in own):
                raise self.wrong(rows, place, key, "images", "a list of ids of 'categories'")
            values += own
            ends.append(len(values))
        labels = np.searchsorted(ids, np.array(values, np.int64)).astype(np.int32)
        return Ragged(labels, np.array(ends, np.int64))

    def sizes(self, rows: Rows, key: str) -> np.ndarray:
        values = self.whole_numbers(rows, key, "images")
        for place in np.flatnonzero((values < 1) | (values >= 2**31)).tolist():
            raise self.wrong(rows, place, key, "images", "the size in pixels")
        return values.astype(np.int32)

    def file_name(self, row: dict[str, Any], place: int) -> str:
        """``file_name``, else (LVIS) the last folder and the name of ``coco_url``."""
        name, url = row.get("file_name"), row.get("coco_url")
        if name is None and isinstance(url, str):
            return os.path.join(*url.split("/")[-2:])
        if not isinstance(name, str) or not name:
            raise ValueError(f"{self.file}: image with id {row['id']} has file_name {_short(name)}; expected a path")
        return name

    def boxes(self, rows: Rows) -> np.ndarray:
        flat = array("d")
        for place, row in enumerate(rows):
            try:
                x, y, width, height = row["bbox"]
                flat.extend((x, y, width, height))
            except (KeyError, TypeError, ValueError):
                raise self.wrong(rows, place, "bbox", "annotations", _BOX) from None
        boxes = np.frombuffer(flat, np.float64).reshape(-1, 4)
        for place in np.flatnonzero(~np.isfinite(boxes).all(axis=1)).tolist():
            raise self.wrong(rows, place, "bbox", "annotations", _BOX)
        return boxes

    def areas(self, rows: Rows, boxes: np.ndarray) -> tuple[np.ndarray, int]:
        """Areas, and how many were missing."""
        missing = [place for place, row in enumerate(rows) if row.get("area") is None]
        if missing:
            log.warning(
                "%s: %d annotations have no area; that of the box is taken, so results by size will be others",
                self.file,
                len(missing),
            )
        areas = boxes[:, 2] * boxes[:, 3]
        for place, row in enumerate(rows):
            value = row.get("area")
            if value is not None:
                if not isinstance(value, int | float) or not np.isfinite(value):
                    raise self.wrong(rows, place, "area", "annotations", "a number")
                areas[place] = value
        return areas, len(missing)

    def segmentations(self, rows: Rows) -> tuple[SegmentationColumns, int]:
        """The columns, and how many polygons were left out because they have less than three corners."""
        from tqdm import tqdm

        builder = _Segmentations()
        for place, row in enumerate(tqdm(rows, "indexing", unit="object", delay=2, dynamic_ncols=True)):
            if not builder.add(row.get("segmentation")):
                raise self.wrong(rows, place, "segmentation", "annotations", _SEGMENTATION)
        if builder.num_degenerate:
            log.warning(
                "%s: %d polygons are left out, which have less than three corners or an odd number of coordinates",
                self.file,
                builder.num_degenerate,
            )
        place = builder.first_not_finite()
        if place is not None:
            raise self.wrong(rows, place, "segmentation", "annotations", f"finite numbers in {_SEGMENTATION}")
        return builder.columns(), builder.num_degenerate


_BOX = "four finite numbers: x, y, width, height"
_SEGMENTATION = '[[x, y, x, y, x, y ...], ...] or {"size": [height, width], "counts": a text or a list}'


class _Segmentations:
    """Columns of segmentations, filled row by row."""

    def __init__(self):
        self._kinds, self._sizes = array("B"), array("i")
        self._last_part, self._part_ends, self._numbers = array("q"), array("q"), array("d")
        self._text, self._text_ends = bytearray(), array("q")
        self.num_degenerate = 0

    def add(self, value: Any) -> bool:
        """Append one; False where it is no segmentation."""
        kind, size = NONE, (0, 0)
        try:
            if isinstance(value, list) and value:
                kind = POLYGONS if self._add_polygons(value) else EMPTY
            elif isinstance(value, dict):
                kind, size = self._add_counts(value)
            elif value:
                return False
            self._sizes.extend(size)
        except (TypeError, ValueError, KeyError, OverflowError):
            return False
        self._kinds.append(kind)
        self._last_part.append(len(self._part_ends))
        self._text_ends.append(len(self._text))
        return True

    def _add_polygons(self, parts: list[Any]) -> bool:
        """False where no part is left. A bare list of numbers is taken as one polygon."""
        before = len(self._part_ends)
        for part in parts if isinstance(parts[0], list) else [parts]:
            if len(part) < 6 or len(part) % 2:
                self.num_degenerate += 1
            else:
                self._add_numbers(part)
        return len(self._part_ends) > before

    def _add_counts(self, value: dict[str, Any]) -> tuple[int, tuple[int, int]]:
        height, width = value["size"]
        counts = value["counts"]
        if isinstance(counts, str):
            self._text += counts.encode("ascii")
            return COMPRESSED, (height, width)
        if any(not isinstance(count, int) or count < 0 for count in counts) or sum(counts) != height * width:
            raise ValueError("counts")
        self._add_numbers(counts)
        return UNCOMPRESSED, (height, width)

    def _add_numbers(self, numbers: list[Any]) -> None:
        self._numbers.fromlist(numbers)
        self._part_ends.append(len(self._numbers))

    def first_not_finite(self) -> int | None:
        """The first row with a coordinate that is no number."""
        wrong = np.flatnonzero(~np.isfinite(np.array(self._numbers)))
        if not wrong.size:
            return None
        part = np.searchsorted(np.array(self._part_ends), wrong[0], side="right")
        return int(np.searchsorted(np.array(self._last_part), part, side="right"))

    def columns(self) -> SegmentationColumns:
        return SegmentationColumns(
            np.array(self._kinds, np.uint8),
            np.array(self._sizes, np.int32).reshape(-1, 2),
            np.array(self._last_part, np.int64),
            np.array(self._part_ends, np.int64),
            np.array(self._numbers, np.float64),
            np.frombuffer(bytes(self._text), np.uint8),
            np.array(self._text_ends, np.int64),
        )


def _check_mask_sizes(file: Path, columns: SegmentationColumns, rows: Rows, sizes: np.ndarray) -> None:
    wrong = np.flatnonzero(np.isin(columns.kinds, (COMPRESSED, UNCOMPRESSED)) & (columns.sizes != sizes).any(axis=1))
    if wrong.size:
        place = int(wrong[0])
        raise ValueError(
            f"{file}: the mask of annotation {_short(rows[place].get('id'))} has height and width "
            f"{columns.sizes[place].tolist()}, its image {_short(rows[place]['image_id'])} has "
            f"{sizes[place].tolist()}; {wrong.size} such masks"
        )
