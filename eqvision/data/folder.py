"""Image folders: one folder for each class."""

import os
from pathlib import Path

import numpy as np

from eqvision.data.encoded import ImageDecoder, labels_of_names
from eqvision.data.listing import Listing, check_same_classes, list_images, split_root
from eqvision.data.packed import PackedStrings, pack_strings
from eqvision.data.sources import Example


class ImageFolder:
    """Images in one folder per class, ``{train,val,test}/CLASS/*.jpg`` or ``CLASS/*.jpg``; decoded on access.

    Labels are positions in ``class_names``: the sorted folder names ("10" sorts before "2"), unless given.
    ``on_corrupt`` is for images that cannot be decoded; see ``ImageDecoder``.
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
        base = Path(path).expanduser().absolute()
        self.root = split_root(base, split)
        if split is not None and class_names is None:
            check_same_classes(base, split)
        listing = list_images(self.root)
        self.class_names = tuple(class_names) if class_names is not None else listing.classes
        self.labels, self._files = _flatten(listing, self.class_names, self.root)

    @property
    def num_skipped(self) -> int:
        """How many different files could not be decoded so far."""
        return self._decoder.num_skipped

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return self._decoder.example(self, index)

    def encoded(self, index: int) -> bytes:
        """The content of the file."""
        return Path(self.describe(index)).read_bytes()

    def describe(self, index: int) -> str:
        """Absolute path of the file."""
        return os.path.join(self.root, self._files.text(index))


def _flatten(listing: Listing, class_names: tuple[str, ...], root: Path) -> tuple[np.ndarray, PackedStrings]:
    labels = labels_of_names(list(listing.classes), class_names, f"class folder {root}{os.sep}")
    counts = [len(files) for files in listing.files]
    names = (os.path.join(name, file) for name, files in zip(*listing, strict=True) for file in files)
    return np.repeat(labels, counts), pack_strings(names)
