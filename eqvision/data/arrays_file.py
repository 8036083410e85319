"""Reading ``Arrays`` from a ``.npz`` archive or a folder of ``.npy`` files, under the names people give them."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from eqvision.data.listing import SPLIT_NAMES, SPLITS, nearest_existing
from eqvision.data.sources import Arrays

IMAGE_KEYS = ("images", "image", "x", "X", "data")
LABEL_KEYS = ("labels", "label", "y", "Y", "targets")


def load_arrays(
    path: str | os.PathLike,
    split: str | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Arrays:
    """Images and labels of a ``.npz`` file, or of a folder with ``images.npy`` and ``labels.npy`` (memory-mapped).

    With a split the names carry it (``x_train``, ``train_images``, ``images_test`` ...) or the folder has a sub-folder
    of that name. Raises FileNotFoundError, KeyError listing the names that exist, ValueError for unreadable content.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}, or None")
    file = Path(path).expanduser().absolute()
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; {nearest_existing(file)}")
    if file.is_dir() and split is not None and (file / split).is_dir():
        return load_arrays(file / split, None, class_names)
    arrays = _open_folder(file) if file.is_dir() else _open_npz(file)
    images = _find(arrays, IMAGE_KEYS, split, "images", file)
    labels = _find(arrays, LABEL_KEYS, split, "labels", file)
    return Arrays(images, labels, class_names, name=f"{file}" + (f" ({split})" if split else ""))


def _find(arrays: Mapping, keys: tuple[str, ...], split: str | None, what: str, file: Path) -> np.ndarray:
    names = [name for key in keys for name in _names(key, split)]
    found = [name for name in names if name in arrays]
    if len(found) == 1:
        return _read(arrays, found[0], file)
    if found:
        raise KeyError(f"{file} has several candidates for {what}: {', '.join(found)}; keep one of them")
    splits = [s for s in SPLITS if any(name in arrays for key in keys for name in _names(key, s))]
    if split is None and splits:
        raise KeyError(f"{file} has {what} per split: pass split={splits[0]!r} (it has: {', '.join(splits)})")
    wanted = what if split is None else f"{what} for split {split!r}"
    present = ", ".join(sorted(arrays)) or "nothing"
    raise KeyError(f"{file} has no {wanted}: it has {present}; expected one of {', '.join(names)}")


def _names(key: str, split: str | None) -> list[str]:
    if split is None:
        return [key]
    return [name for alias in SPLIT_NAMES[split] for name in (f"{key}_{alias}", f"{alias}_{key}")]


def _open_npz(file: Path) -> Mapping:
    try:
        archive = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is not a readable .npz archive: {error}") from error
    if isinstance(archive, np.ndarray):
        raise ValueError(f"{file} is a single array; expected a .npz, or a folder with images.npy and labels.npy")
    return archive


def _open_folder(folder: Path) -> Mapping:
    return {file.stem: file for file in folder.glob("*.npy")}


def _read(arrays: Mapping, name: str, file: Path) -> np.ndarray:
    try:
        if isinstance(arrays, dict):
            return np.load(arrays[name], mmap_mode="r", allow_pickle=False)
        return arrays[name]
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: cannot read {name!r}: {error}") from error
