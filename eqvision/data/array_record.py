"""Images in ArrayRecord files (https://github.com/google/array_record): few files, any record at once.

The format is ours and plain. A file holds n + 1 records. Records 0 to n - 1 are the encoded images, byte for byte as
they were in their files. The last record is JSON text: ``{"format": "eqvision-images", "version": 1,
"class_names": [...], "labels": [...], "names": [...]}`` with n labels (class numbers, or rows of numbers) and n names
for messages. So one small read for each file gives all labels.
"""

import functools
import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eqvision.data.columns import same_classes
from eqvision.data.decode import CorruptImageError
from eqvision.data.encoded import EncodedSource, ImageDecoder
from eqvision.data.packed import pack_strings
from eqvision.data.shards import MARK, Shard, find_shards, stamp
from eqvision.data.sources import Example

if TYPE_CHECKING:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

SUFFIX = ".array_record"
FORMAT, VERSION = "eqvision-images", 1


class ArrayRecords:
    """Images in ``*.array_record`` files that ``write_array_record`` wrote.

    ``path`` and ``split`` as in ``find_shards``. Raises what that raises, ImportError without the extra [records],
    ValueError for files of another format or with different classes.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str | None = None,
        *,
        in_channels: int = 3,
        on_corrupt: str = "raise",
        class_names: tuple[str, ...] | None = None,
    ):
        self._decoder = ImageDecoder(in_channels, on_corrupt)
        self._shards = tuple(stamp(file) for file in find_shards(path, split, SUFFIX))
        tables = [_table(shard) for shard in self._shards]
        self.class_names = _class_names(tables, self._shards, class_names)
        self.labels = _joined_labels(tables)
        self._names = pack_strings(name for table in tables for name in table["names"])
        self._ends = np.cumsum([len(table["names"]) for table in tables])

    @property
    def num_skipped(self) -> int:
        """How many different images could not be decoded so far."""
        return self._decoder.num_skipped

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return self._decoder.example(self, index)

    def encoded(self, index: int) -> bytes:
        """The record. Raises CorruptImageError where its checksum is wrong."""
        shard, record = self._place(index)
        try:
            return _opened(shard)[record]
        except RuntimeError as error:
            raise CorruptImageError(f"corrupt image {self.describe(index)}: {error}") from error

    def describe(self, index: int) -> str:
        """Absolute path of the file, ``::``, number of the record and name of the image."""
        shard, record = self._place(index)
        return f"{shard.file}{MARK}{record} ({self._names.text(index)})"

    def _place(self, index: int) -> tuple[Shard, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._shards[shard], int(index - (self._ends[shard - 1] if shard else 0))


def write_array_record(
    source: EncodedSource, folder: str | os.PathLike, split: str | None = None, *, shard_size: int = 4096
) -> list[Path]:
    """Write the images of a source, as they are stored, to ``folder/SPLIT-00000-of-00004.array_record`` and so on.

    ``shard_size`` is in images. Nothing is decoded, so corrupt images are copied too. Returns the files. Raises
    FileExistsError where the folder has files of that split, ImportError without the extra [records].
    """
    folder = Path(folder).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    name = split or "images"
    present = sorted(folder.glob(f"{name}-*{SUFFIX}"))
    if present:
        raise FileExistsError(f"{present[0]} exists already; choose another folder or remove the files of {name!r}")
    if shard_size < 1 or len(source) == 0:
        raise ValueError(f"shard_size={shard_size} and {len(source)} images; expected at least one of each")
    count = -(-len(source) // shard_size)
    files = [folder / f"{name}-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(count)]
    for number, file in enumerate(files):
        _write_shard(source, range(number * shard_size, min((number + 1) * shard_size, len(source))), file)
    return files


def _write_shard(source: EncodedSource, indices: range, file: Path) -> None:
    # A killed writer leaves a file that no reader takes for a shard. The images are compressed already.
    unfinished = file.with_name(f".{file.name}.tmp")
    writer = _module().ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
    for index in indices:
        writer.write(source.encoded(index))
    table = {
        "format": FORMAT,
        "version": VERSION,
        "class_names": source.class_names,
        "labels": source.labels[indices.start : indices.stop].tolist(),
        "names": [os.path.basename(source.describe(index)) for index in indices],
    }
    writer.write(json.dumps(table).encode())
    writer.close()
    os.replace(unfinished, file)


def _table(shard: Shard) -> dict[str, Any]:
    """The last record of a shard."""
    records = _opened(shard)
    try:
        table = json.loads(records[len(records) - 1])
        if table["format"] != FORMAT or table["version"] != VERSION:
            raise ValueError(f"it says {table['format']!r} version {table['version']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{shard.file} has no table of labels in its last record ({error}); expected a file written by "
            "eqvision.data.write_array_record. For files of TFDS use the kind 'tfds'"
        ) from error
    counts = {"records": len(records) - 1, "labels": len(table["labels"]), "names": len(table["names"])}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{shard.file} contradicts itself: {counts}; write it again")
    return table


def _class_names(
    tables: list[dict[str, Any]], shards: tuple[Shard, ...], wanted: tuple[str, ...] | None
) -> tuple[str, ...]:
    names = tuple(tables[0]["class_names"])
    for table, shard in zip(tables, shards, strict=True):
        if tuple(table["class_names"]) != names:
            raise ValueError(
                f"{shard.file} and {shards[0].file} have different class_names; they belong to different sets"
            )
    return same_classes(names, wanted, shards[0].file)


def _joined_labels(tables: list[dict[str, Any]]) -> np.ndarray:
    labels = np.concatenate([np.array(table["labels"]) for table in tables])
    return labels.astype(np.int32 if labels.ndim == 1 else np.float32)


def _module() -> Any:
    try:
        return importlib.import_module("array_record.python.array_record_module")
    except ImportError as error:
        raise ImportError("ArrayRecord files need array_record: pip install eqvision[records]") from error


@functools.lru_cache(128)
def _opened(shard: Shard) -> "ArrayRecordDataSource":
    """Per process, and one for all threads, which the reader allows."""
    _module()
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        return ArrayRecordDataSource(shard.file)
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{shard.file} is no whole ArrayRecord file: {error}") from error
