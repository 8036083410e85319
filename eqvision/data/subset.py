"""A source without some of its examples: by position, or by the list that ``eqvision data check`` wrote."""

import logging
import os
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Int

from eqvision.data.bad_files import read_bad_files
from eqvision.data.encoded import EncodedSource
from eqvision.data.mixture import Mixture
from eqvision.data.sources import Example, Source

log = logging.getLogger(__name__)


class Subset:
    """The examples of a source at ``indices``, in that order; ``Example.index`` is the place among them."""

    def __init__(self, source: Source, indices: Int[np.ndarray, " n"]):
        if isinstance(source, Mixture):
            raise TypeError("a Subset of a Mixture would change its weights; take subsets of its sources")
        self._source = source
        self._indices = np.asarray(indices, np.int64)
        self.class_names, self.labels = source.class_names, source.labels[self._indices]
        if isinstance(source, EncodedSource):
            self.encoded = self._encoded  # only then: a subset of arrays must not look like encoded images

    @property
    def num_skipped(self) -> int:
        """Corrupt images met so far."""
        return self._source.num_skipped

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        return self._source[int(self._indices[index])]._replace(index=index)

    def _encoded(self, index: int) -> bytes:
        """As stored."""
        return cast(EncodedSource, self._source).encoded(int(self._indices[index]))

    def describe(self, index: int) -> str:
        """As the source says."""
        return self._source.describe(int(self._indices[index]))


def exclude(source: Source, file: str | os.PathLike, root: str | os.PathLike, split: str | None = None) -> Source:
    """The source, a split of the data set at ``root``, without the images in a list of ``eqvision data check``.

    The data set may have been moved since, and listed files removed, which is logged. Raises FileNotFoundError, and
    ValueError where the list is of another data set or split, or leaves nothing.
    """
    bad = read_bad_files(file)
    if (split or "") not in bad.splits:
        raise ValueError(f"{file} is no list for split {split!r} of {root}; it has: {', '.join(bad.splits)}")
    base = str(Path(root).expanduser().absolute())
    wanted = {_moved(entry.name, bad.root, base) for entry in bad.splits[split or ""]}
    keep = np.array([source.describe(index) not in wanted for index in range(len(source))])
    _check_found(wanted, int(np.count_nonzero(~keep)), len(source), f"{file} (split {split!r})")
    return Subset(source, np.flatnonzero(keep))


def _moved(name: str, before: str, now: str) -> str:
    return now + name[len(before) :] if name.startswith(before) else name


def _check_found(wanted: set[str], found: int, total: int, where: str) -> None:
    if wanted and not found:
        raise ValueError(
            f"none of the {len(wanted)} images in {where} is in the data (first: {min(wanted)}); it is the list of "
            "another data set, or they were removed: run eqvision data check again"
        )
    if found < len(wanted):
        log.warning("%s names %d images, %d of them are no longer in the data", where, len(wanted), len(wanted) - found)
    if found == total:
        raise ValueError(f"{where} names all {total} images: none is left")
    log.info("%s: left out %d of %d images", where, found, total)
