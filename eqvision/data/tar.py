"""Tar shards as WebDataset writes them, with random access."""

import functools
import os

import numpy as np
from jaxtyping import Int

from eqvision.data.encoded import ImageDecoder, labels_of_names
from eqvision.data.listing import some_names
from eqvision.data.shards import MARK, Shard, find_shards, shard_splits, stamp
from eqvision.data.sources import Example
from eqvision.data.tar_index import TarIndex, index_of_shards

_OPEN_FILES = 128  # shards that a process keeps open; many systems allow 1,024 files


class TarShards:
    """Images in ``.tar`` files. Labels: ``NAME.cls`` (class number or name) or ``NAME.json`` with a "label" beside
    ``NAME.jpg``, or else the folder that holds the image inside the archive.

    ``path`` and ``split`` as in ``find_shards``. Class names are the sorted texts, or "0" to the largest number over
    all splits, unless given. The first use of an archive reads all its headers; the index is then kept in the cache
    folder. Raises what ``find_shards`` and ``index_of_shards`` raise, and ValueError for splits whose classes differ.
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
        self._shards = tuple(stamp(file) for file in find_shards(path, split, ".tar"))
        self._index = index_of_shards(self._shards)
        self.class_names = tuple(class_names) if class_names is not None else _class_names(self._index, path, split)
        self.labels = _labels(self._index, self.class_names, self._shards[0].file)

    @property
    def num_skipped(self) -> int:
        """How many different images could not be decoded so far."""
        return self._decoder.num_skipped

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return self._decoder.example(self, index)

    def encoded(self, index: int) -> bytes:
        """The member's content. Raises OSError where the shard has changed since it was indexed."""
        shard = self._shards[self._index.shards[index]]
        return _opened(shard).read(int(self._index.offsets[index]), int(self._index.sizes[index]))

    def describe(self, index: int) -> str:
        """Absolute path of the shard, ``::``, name of the member."""
        return f"{self._shards[self._index.shards[index]].file}{MARK}{self._index.names.text(index)}"


def _class_names(index: TarIndex, path: str | os.PathLike, split: str | None) -> tuple[str, ...]:
    values = set(index.label_values)
    for other in shard_splits(path, ".tar") if split is not None else []:
        shards = tuple(stamp(file) for file in find_shards(path, other, ".tar"))
        theirs = set(index_of_shards(shards).label_values)
        if theirs != values and not _are_numbers(index):
            raise ValueError(
                f"classes of {path} differ: only in {split!r}: {some_names(values - theirs)}; only in {other!r}: "
                f"{some_names(theirs - values)}. Labels are positions in the sorted names, so all splits need the same "
                "classes; otherwise fix them with class_names=(...)"
            )
        values |= theirs
    if _are_numbers(index):
        return tuple(map(str, range(max(int(value) for value in values) + 1)))
    return tuple(sorted(values))


def _are_numbers(index: TarIndex) -> bool:
    # A folder name is a name, "10" too, as in an image folder.
    return index.label_kind != "folder" and all(value.isdecimal() for value in index.label_values)


def _labels(index: TarIndex, class_names: tuple[str, ...], shard: str) -> Int[np.ndarray, " n"]:
    if _are_numbers(index):  # too large a number is for check_labels to find, which names the example
        return np.array([int(value) for value in index.label_values], np.int32)[index.label_codes]
    values = labels_of_names(list(index.label_values), class_names, f"{shard} or a shard beside it: class ")
    return values[index.label_codes]


class _OpenShard:
    """An open file that any number of threads read from; closed when the last of them has let go of it."""

    def __init__(self, shard: Shard):
        self._shard = shard
        self._descriptor = os.open(shard.file, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        if (status.st_size, status.st_mtime_ns) != (shard.size, shard.changed_ns):
            raise OSError(f"{shard.file} has changed since this source was made; make it again")

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)  # has no position that threads could share
        if len(data) != size:
            raise OSError(f"{self._shard.file} ended {size - len(data)} bytes early at byte {offset + len(data)}")
        return data

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


@functools.lru_cache(_OPEN_FILES)
def _opened(shard: Shard) -> _OpenShard:
    """Per process: what is open is never pickled."""
    return _OpenShard(shard)
