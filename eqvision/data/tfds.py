"""Data sets that TensorFlow Datasets has prepared as ArrayRecord files, read without TensorFlow."""

import functools
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from eqvision.data.cache import cache_file, settled, store
from eqvision.data.columns import choose_column, same_classes
from eqvision.data.encoded import ImageDecoder
from eqvision.data.listing import SPLIT_NAMES
from eqvision.data.shards import stamp
from eqvision.data.sources import Example

log = logging.getLogger(__name__)


class TfdsImages:
    """A prepared TFDS data set with one image and one class per example.

    ``path`` is the folder with ``dataset_info.json``, or one above it that holds only that one version. ``split`` is
    any that TFDS understands ("train", "train[:90%]"); "val" finds "validation". The columns are called "image" and
    "label", or are the only ones of their kind, unless given. The first use reads all records for their labels, which
    are then kept in the cache folder. Raises ImportError without the extra [tfds], FileNotFoundError, and ValueError
    for other file formats, splits or columns.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str | None = None,
        *,
        in_channels: int = 3,
        on_corrupt: str = "raise",
        class_names: tuple[str, ...] | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ):
        self._decoder = ImageDecoder(in_channels, on_corrupt)
        folder = prepared_folder(path)
        builder = _builder(str(folder))
        self._split = _resolve_split(list(builder.info.splits), split, folder)
        kinds = _tfds().features
        features = builder.info.features
        self._image = choose_column(features, kinds.Image, image_column, "image", f"{folder}")
        self._label = choose_column(features, kinds.ClassLabel, label_column, "label", f"{folder}")
        self.class_names = same_classes(tuple(features[self._label].names), class_names, f"{folder}")
        self._folder = str(folder)
        self.labels = self._read_labels()

    @property
    def num_skipped(self) -> int:
        """How many different images could not be decoded so far."""
        return self._decoder.num_skipped

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return self._decoder.example(self, index)

    def encoded(self, index: int) -> bytes:
        """The image of a record, not decoded."""
        return _records(self._folder, self._split, self._image)[index][self._image]

    def describe(self, index: int) -> str:
        """Folder, split and number of the record."""
        return f"{self._folder}/{self._split}[{index}]"

    def _read_labels(self) -> Int[np.ndarray, " n"]:
        stamps = [stamp(file) for file in sorted(Path(self._folder).iterdir()) if file.is_file()]
        file = cache_file("tfds", f"{stamps}\n{self._split}\n{self._label}", ".npz")
        try:
            with np.load(file, allow_pickle=False) as stored:
                return stored["labels"]
        except FileNotFoundError:
            pass  # not yet
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("ignored the unreadable labels %s (%s); reading the records again", file, error)
        labels = self._scan_labels()
        if settled(each.changed_ns for each in stamps):
            store(file, lambda f: np.savez(f, labels=labels))
        return labels

    def _scan_labels(self) -> Int[np.ndarray, " n"]:
        from tqdm import tqdm

        records = _records(self._folder, self._split, self._image)
        bar = tqdm(range(len(records)), f"reading labels of {self._split}", delay=2, dynamic_ncols=True)
        return np.array([records[index][self._label] for index in bar], np.int32)


def prepared_folder(path: str | os.PathLike) -> Path:
    """The folder with ``dataset_info.json``: the path itself, or the only one up to two levels below it."""
    base = Path(path).expanduser().absolute()
    if (base / "dataset_info.json").is_file():
        return base
    found = sorted(file.parent for pattern in ("*", "*/*") for file in base.glob(f"{pattern}/dataset_info.json"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{base} holds several prepared data sets; choose one: {', '.join(map(str, found[:5]))}")
    raise FileNotFoundError(f"{base} has no dataset_info.json; expected a folder DATA_DIR/NAME/VERSION that TFDS wrote")


def tfds_splits(path: str | os.PathLike) -> list[str]:
    """Names of the splits of a prepared data set."""
    return list(_builder(str(prepared_folder(path))).info.splits)


def _resolve_split(splits: list[str], wanted: str | None, folder: Path) -> str:
    if wanted is None and len(splits) == 1:
        return splits[0]
    for name in SPLIT_NAMES.get(wanted or "", (wanted,)):
        if name in splits or (name and name.split("[")[0] in splits):
            return name
    raise ValueError(f"{folder} has no split {wanted!r}; it has: {', '.join(splits)}")


# Per process: nothing of TFDS is pickled


@functools.lru_cache(8)
def _builder(folder: str) -> Any:
    return _tfds().builder_from_directory(folder)


@functools.lru_cache(8)
def _records(folder: str, split: str, image: str) -> Any:
    tfds = _tfds()
    try:
        return _builder(folder).as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise ValueError(
            f"{folder} has no random access: {error}. Prepare it with download_and_prepare(file_format='array_record')"
        ) from error


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError("TFDS data sets need tensorflow-datasets: pip install eqvision[tfds]") from error
    return tensorflow_datasets
