"""COCO instances as columns: parsed once, kept in the cache as one memory-mapped file, opened without parsing.

The annotations of train2017 are 448 MB of JSON and 860,000 dictionaries; as columns they are a few arrays, of which
only what is read takes memory. Nothing is lost: boxes, areas and outlines stay float64 as in the file, because rounded
ones would make other pixels. A made-up file of that size (486 MB) took 35 s of processor time and 3.5 GB to parse, most
of it in Python's JSON, and 1 ms to map afterwards. Opening a source on it, which looks whether all 118,287 images are
there, took 0.7 s on two cores that were busy with other work.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, UInt8

from eqvision.data.cache import cache_file, settled, store
from eqvision.data.detection.annotations import CompressedRLE, Polygons, Segmentation, UncompressedRLE
from eqvision.data.packed import PackedStrings

log = logging.getLogger(__name__)

_VERSION = 2
_ALIGNMENT = 64
_FORMAT = (1, 0)  # of .npy

NONE, POLYGONS, COMPRESSED, UNCOMPRESSED, EMPTY = range(5)  # EMPTY: polygons, none of which has three corners


class SegmentationColumns(NamedTuple):
    """The segmentation of annotation i: its kind, and where its numbers or characters lie.

    Part p (a polygon, or uncompressed counts) is ``numbers[part_ends[p - 1] : part_ends[p]]``; annotation i has the
    parts before ``last_part[i]``. Its compressed counts are the characters before ``text_ends[i]``.
    """

    kinds: UInt8[np.ndarray, " m"]
    sizes: Int32[np.ndarray, "m 2"]
    last_part: Int64[np.ndarray, " m"]
    part_ends: Int64[np.ndarray, " p"]
    numbers: Float64[np.ndarray, " k"]
    text: UInt8[np.ndarray, " t"]
    text_ends: Int64[np.ndarray, " m"]


class Ragged(NamedTuple):
    """Lists of labels, one for each image: that of image i ends before ``ends[i]``."""

    values: Int32[np.ndarray, " v"]
    ends: Int64[np.ndarray, " n"]

    def row(self, image: int) -> Int32[np.ndarray, " _"]:
        """The list of one image."""
        return np.array(self.values[self.ends[image - 1] if image else 0 : self.ends[image]])


class CocoIndex(NamedTuple):
    """Images in order of id; the annotations of image i are those from ``last[i - 1]`` to ``last[i]``.

    Annotations are as in the file: ``boxes_xywh`` may be empty or reach out of the image. ``labels`` are positions in
    ``category_ids``, which are sorted. ``notes`` counts what was mended: "area" (missing, so that of the box is
    taken), "polygons" (parts with less than three corners, which are left out). LVIS files have two lists of labels for
    each image: ``negative`` (looked for and not there), and ``not_exhaustive`` (not all are marked); and for each class
    whether it is rare, common or frequent ("r", "c", "f"), which is None elsewhere. ``stored`` is the file that the
    arrays are mapped from, None where they are in memory.
    """

    image_ids: Int64[np.ndarray, " n"]
    heights: Int32[np.ndarray, " n"]
    widths: Int32[np.ndarray, " n"]
    file_names: PackedStrings
    last: Int64[np.ndarray, " n"]
    annotation_ids: Int64[np.ndarray, " m"]
    labels: Int32[np.ndarray, " m"]
    boxes_xywh: Float64[np.ndarray, "m 4"]
    area: Float64[np.ndarray, " m"]
    iscrowd: Bool[np.ndarray, " m"]
    segmentations: SegmentationColumns
    negative: Ragged
    not_exhaustive: Ragged
    category_ids: Int64[np.ndarray, " c"]
    class_names: tuple[str, ...]
    frequencies: tuple[str, ...] | None
    notes: dict[str, int]
    stored: Path | None = None

    def of_image(self, image: int) -> slice:
        """Where the annotations of image number ``image`` lie in the columns."""
        return slice(int(self.last[image - 1]) if image else 0, int(self.last[image]))

    def image_of(self, annotations: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
        """The numbers of the images to which annotations belong."""
        return np.searchsorted(self.last, annotations, side="right")

    def names(self) -> list[str]:
        """All file names; quicker than asking for each."""
        content, ends = self.file_names.characters.tobytes(), self.file_names.ends.tolist()
        spans = zip([0, *ends[:-1]], ends, strict=True)
        if content.isascii():
            text = content.decode()
            return [text[start:end] for start, end in spans]
        return [os.fsdecode(content[start:end]) for start, end in spans]

    def segmentation(self, annotation: int) -> Segmentation:
        """The segmentation of one annotation, made anew at each call."""
        columns, kind = self.segmentations, self.segmentations.kinds[annotation]
        if kind == NONE:
            return None
        if kind in (POLYGONS, EMPTY):
            return Polygons(tuple(_parts(columns, annotation)))
        height, width = map(int, columns.sizes[annotation])
        if kind == COMPRESSED:
            start = columns.text_ends[annotation - 1] if annotation else 0
            return CompressedRLE((height, width), columns.text[start : columns.text_ends[annotation]].tobytes())
        (counts,) = _parts(columns, annotation)
        return UncompressedRLE((height, width), counts.astype(np.int64))


def _parts(columns: SegmentationColumns, annotation: int) -> Iterator[np.ndarray]:
    first = int(columns.last_part[annotation - 1]) if annotation else 0
    for part in range(first, int(columns.last_part[annotation])):
        start = columns.part_ends[part - 1] if part else 0
        yield np.array(columns.numbers[start : columns.part_ends[part]])


def open_index(file: str | os.PathLike) -> CocoIndex:
    """The columns of a COCO instances file: from the cache where path, size and modification time are the same, else
    parsed, and kept in the cache.

    Raises FileNotFoundError, and ValueError saying what in the file is wrong and where.
    """
    from eqvision.data.detection.coco_json import parse_coco

    path = Path(file).expanduser().absolute()
    stamp = file_stamp(path)
    stored = cache_file("coco", os.path.realpath(path), ".columns")
    index = read_index(stored, stamp)
    if index is not None:
        return index
    index = parse_coco(path)
    if file_stamp(path) != stamp or not settled([stamp[2]]):
        return index
    store(stored, lambda f: write_index(f, index, stamp))
    return read_index(stored, stamp) or index  # the mapped one, so that the other's memory is free again


def file_stamp(path: Path) -> list[Any]:
    """What changes when the file does: resolved path, size, modification time."""
    about = os.stat(path)
    return [os.path.realpath(path), about.st_size, about.st_mtime_ns]


# The file: a JSON header and the columns as .npy, one behind the other, each on a multiple of 64 bytes


def write_index(f: BinaryIO, index: CocoIndex, stamp: list[Any]) -> None:
    """Write the columns; ``stamp`` identifies what they were made of."""
    about = {"version": _VERSION, "stamp": stamp, **{name: getattr(index, name) for name in _TEXTS}}
    header = np.frombuffer(json.dumps(about).encode(), np.uint8)
    for array in (header, *_flat(index)):
        f.write(bytes(-f.tell() % _ALIGNMENT))
        np.lib.format.write_array(f, np.ascontiguousarray(array), version=_FORMAT, allow_pickle=False)


def read_index(file: Path, stamp: list[Any]) -> CocoIndex | None:
    """Map the columns; None where there are none, where they were made of something else, or cannot be read."""
    try:
        header, *columns = _map_arrays(file)
        about = json.loads(header.tobytes())
        if about["version"] != _VERSION or about["stamp"] != stamp:
            return None
        return _from_columns(iter(columns), about, file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, StopIteration) as error:
        log.warning("ignored the unreadable index %s (%s); reading %s again", file, error, stamp[0])
        return None


_TEXTS = ("class_names", "frequencies", "notes")  # in the header
_GROUPS = {  # fields that are columns themselves
    "file_names": PackedStrings,
    "segmentations": SegmentationColumns,
    "negative": Ragged,
    "not_exhaustive": Ragged,
}


def _flat(index: CocoIndex) -> Iterator[np.ndarray]:
    for name in _column_fields():
        field = getattr(index, name)
        yield from field if name in _GROUPS else (field,)


def _from_columns(columns: Iterator[np.ndarray], about: dict[str, Any], file: Path) -> CocoIndex:
    fields: dict[str, Any] = {}
    for name in _column_fields():
        group = _GROUPS.get(name)
        fields[name] = next(columns) if group is None else group(*[next(columns) for _ in group._fields])
    names, frequencies = tuple(about["class_names"]), about["frequencies"]
    groups = None if frequencies is None else tuple(frequencies)
    return CocoIndex(**fields, class_names=names, frequencies=groups, notes=about["notes"], stored=file)


def _column_fields() -> list[str]:
    return [name for name in CocoIndex._fields if name not in (*_TEXTS, "stored")]


def _map_arrays(file: Path) -> list[np.ndarray]:
    arrays: list[np.ndarray] = []
    with open(file, "rb") as f:
        content = np.asarray(np.memmap(f, np.uint8, "r"))
        place = 0
        while place < len(content):
            f.seek(place)
            np.lib.format.read_magic(f)
            shape, _, dtype = np.lib.format.read_array_header_1_0(f)
            start, size = f.tell(), int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            arrays.append(content[start : start + size].view(dtype).reshape(shape))
            place = -(-(start + size) // _ALIGNMENT) * _ALIGNMENT
    return arrays
