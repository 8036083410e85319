"""The kinds of data sets on disk, by the names that the configuration gives them."""

import os
from collections.abc import Callable
from pathlib import Path

from eqvision.data.array_record import SUFFIX, ArrayRecords
from eqvision.data.encoded import EncodedSource
from eqvision.data.folder import ImageFolder
from eqvision.data.huggingface import HuggingFaceImages, saved_splits
from eqvision.data.listing import SPLITS
from eqvision.data.shards import shard_splits
from eqvision.data.tar import TarShards
from eqvision.data.tfds import TfdsImages, tfds_splits
from eqvision.names import nearest

_KINDS: dict[str, Callable[..., EncodedSource]] = {
    "folder": ImageFolder,
    "tar": TarShards,
    "array_record": ArrayRecords,
    "tfds": TfdsImages,
    "huggingface": HuggingFaceImages,
}


def open_source(
    kind: str,
    path: str | os.PathLike,
    split: str | None = None,
    *,
    in_channels: int = 3,
    on_corrupt: str = "raise",
    class_names: tuple[str, ...] | None = None,
) -> EncodedSource:
    """A data set of encoded images: kinds "folder", "tar", "array_record", "tfds", "huggingface".

    Raises UnknownNameError for another kind, and what the source of that kind raises.
    """
    if kind not in _KINDS:
        raise nearest(kind, list(_KINDS), "data kind")
    return _KINDS[kind](path, split, in_channels=in_channels, on_corrupt=on_corrupt, class_names=class_names)


def guess_kind(path: str | os.PathLike) -> str:
    """The kind that the files at ``path`` look like; "folder" where nothing else fits."""
    base = Path(path).expanduser().absolute()
    if base.suffix == ".tar":
        return "tar"
    if SUFFIX in base.name:
        return "array_record"
    if _has(base, "state.json"):
        return "huggingface"
    if _has(base, "features.json"):
        return "tfds"
    for kind, suffix in (("tar", ".tar"), ("array_record", SUFFIX)):
        if _has(base, f"*{suffix}*"):
            return kind
    return "folder"


def _has(base: Path, pattern: str) -> bool:
    return any(next(base.glob(f"{below}{pattern}"), None) for below in ("", "*/"))


def splits_of(kind: str, path: str | os.PathLike) -> list[str | None]:
    """The splits of a data set; [None] for one that is not split."""
    base = Path(path).expanduser().absolute()
    if kind == "huggingface":
        return list(saved_splits(base)) or [None]
    if kind == "tfds":
        return list(tfds_splits(base))
    if kind in ("tar", "array_record"):
        return list(shard_splits(base, ".tar" if kind == "tar" else SUFFIX)) or [None]
    return [split for split in SPLITS if (base / split).is_dir()] or [None]
