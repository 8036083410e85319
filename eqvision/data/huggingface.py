"""Data sets that Hugging Face ``datasets`` has saved to disk."""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from eqvision.data.columns import choose_column, same_classes
from eqvision.data.encoded import ImageDecoder
from eqvision.data.listing import SPLIT_NAMES, nearest_existing
from eqvision.data.sources import Example


class HuggingFaceImages:
    """A data set written by ``save_to_disk``, with an Image and a ClassLabel column; decoded here, by Pillow.

    The columns are called "image" and "label", or are the only ones of their kind, unless given; "val" finds the
    split "validation". Raises ImportError without the extra [hf], FileNotFoundError, and ValueError for splits and
    columns that do not exist.
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
        self._folder = str(_split_folder(Path(path).expanduser().absolute(), split))
        kinds, table = _datasets(), _opened(self._folder)
        self._image = choose_column(table.features, kinds.Image, image_column, "image", self._folder)
        label = choose_column(table.features, kinds.ClassLabel, label_column, "label", self._folder)
        self.class_names = same_classes(tuple(table.features[label].names), class_names, self._folder)
        self.labels = _labels(table, label)

    @property
    def num_skipped(self) -> int:
        """How many different images could not be decoded so far."""
        return self._decoder.num_skipped

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return self._decoder.example(self, index)

    def encoded(self, index: int) -> bytes:
        """The stored bytes, or the content of the file that the row names."""
        image = _images(self._folder, self._image)[index][self._image]
        if image["bytes"] is not None:
            return image["bytes"]
        return Path(image["path"]).read_bytes()

    def describe(self, index: int) -> str:
        """Folder and number of the row."""
        return f"{self._folder}[{index}]"


def saved_splits(path: str | os.PathLike) -> list[str]:
    """Names of the splits of a saved DatasetDict; none for a single saved Dataset."""
    base = Path(path).expanduser().absolute()
    return sorted(file.parent.name for file in base.glob("*/state.json"))


def _split_folder(base: Path, split: str | None) -> Path:
    splits = saved_splits(base)
    if (base / "state.json").is_file():
        if split is not None and base.name not in SPLIT_NAMES.get(split, (split,)):
            raise ValueError(f"{base} is a single Dataset; expected split=None or a DatasetDict that has {split!r}")
        return base
    if not splits:
        hint = "" if base.is_dir() else f" ({nearest_existing(base)})"
        raise FileNotFoundError(f"{base} is no data set written by datasets' save_to_disk{hint}")
    names = splits if split is None and len(splits) == 1 else SPLIT_NAMES.get(split or "", (split,))
    for name in names:
        if name in splits:
            return base / name
    raise ValueError(f"{base} has no split {split!r}; it has: {', '.join(splits)}")


def _labels(table: Any, column: str) -> Int[np.ndarray, " n"]:
    """One column only: no image is touched. A missing label (None) becomes -1."""
    values = table.select_columns([column]).with_format("arrow")[:][column]
    return values.fill_null(-1).to_numpy().astype(np.int32)


# Per process: the tables are memory-mapped files, which are opened again rather than pickled


@functools.lru_cache(8)
def _opened(folder: str) -> Any:
    return _datasets().load_from_disk(folder)


@functools.lru_cache(8)
def _images(folder: str, column: str) -> Any:
    images = _opened(folder).select_columns([column])
    return images.cast_column(column, _datasets().Image(decode=False))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hugging Face data sets need the package datasets: pip install eqvision[hf]") from error
    return datasets
