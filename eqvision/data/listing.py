"""What is in an image folder: the CLASS/image layout, its mistakes explained, and the listing kept between runs."""

import difflib
import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

from eqvision.data.cache import cache_file, settled, store
from eqvision.data.decode import IMAGE_EXTENSIONS

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
# What files and folders of other makers call them
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
LAYOUT = "ROOT/{train,val,test}/CLASS/image.jpg, or CLASS/image.jpg directly"
_VERSION = 1


class Listing(NamedTuple):
    """Class folder names, and the image file names in each; both sorted by code point."""

    classes: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]


def split_root(path: Path, split: str | None) -> Path:
    """The folder that holds the class folders. Raises where the path or the split is missing."""
    _check_folder(path)
    if split is None:
        _refuse_unsplit(path)
        return path
    if split not in SPLITS:
        near = difflib.get_close_matches(split, SPLITS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown split {split!r}; did you mean {near!r}? Valid: {', '.join(SPLITS)}, or None")
    if not (path / split).is_dir():
        raise FileNotFoundError(_missing_split(path, split))
    return path / split


def class_folders(root: Path) -> tuple[str, ...]:
    """Visible folders in root, sorted; folders of tools (``.git``, ``__MACOSX``) are no classes."""
    return tuple(sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith((".", "__"))))


def check_same_classes(path: Path, split: str) -> None:
    """Raise where the splits beside each other do not have the same class folders."""
    mine = set(class_folders(path / split))
    for other in SPLITS:
        theirs = set(class_folders(path / other)) if (path / other).is_dir() else set()
        if mine and theirs and theirs != mine:  # a split without any class folder is an unlabelled one
            raise ValueError(
                f"class folders of {path} differ: only in {split!r}: {some_names(mine - theirs)}; "
                f"only in {other!r}: {some_names(theirs - mine)}. Labels are positions in the sorted folder names, so "
                "both splits need the same folders; otherwise fix them with class_names=(...)"
            )


def list_images(root: Path) -> Listing:
    """The class folders of root with their images: from the cache where no folder has changed, else from disk."""
    stored = cache_file("listings", str(root.resolve()), ".json")
    listing = _read_cache(stored, root) or _scan_and_store(root, stored)
    empty = {name for name, files in zip(*listing, strict=True) if not files}
    if empty:
        log.warning("%s: no images in class folders %s", root, some_names(empty))
    return listing


# Reading the folder


def _scan_and_store(root: Path, file: Path) -> Listing:
    folders = {"": _mtime(root)} | {name: _mtime(root / name) for name in class_folders(root)}
    listing = _scan(root)
    if settled(folders.values()):
        content = {"version": _VERSION, "folders": folders, "files": dict(zip(*listing, strict=True))}
        store(file, lambda f: f.write(json.dumps(content).encode()))
    return listing


def _scan(root: Path) -> Listing:
    classes = class_folders(root)
    stray = [e.name for e in os.scandir(root) if _is_image(e)]
    if stray and not classes:
        raise ValueError(
            f"{len(stray)} images (first: {stray[0]}) lie directly in {root}, so their classes are unknown. "
            f"Expected one folder per class: {LAYOUT}"
        )
    files = tuple(_images_of_class(root / name) for name in classes)
    if not any(files):
        raise ValueError(
            f"no images found in {root}. It contains: {_entries(root)}. "
            f"Expected {LAYOUT}, with one of the extensions {' '.join(IMAGE_EXTENSIONS)}"
        )
    if stray:
        log.warning("%s: ignored %d images outside any class folder (first: %s)", root, len(stray), stray[0])
    return Listing(classes, files)


def _images_of_class(folder: Path) -> tuple[str, ...]:
    entries = list(os.scandir(folder))
    for entry in sorted(entries, key=lambda e: e.name):
        nested = _first_image_below(Path(entry.path)) if entry.is_dir() else None
        if nested is not None:
            meant = f"a split, pass split={entry.name!r}" if entry.name in SPLITS else "a class, pass split=None"
            raise ValueError(
                f"wrongly nested: {nested} is more than one folder below {folder.parent}. Images belong directly in "
                f"their class folder ({LAYOUT}); if {entry.name!r} is {meant} and path={str(folder)!r}"
            )
    return tuple(sorted(e.name for e in entries if _is_image(e)))


def _first_image_below(folder: Path) -> Path | None:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith("."):
                return Path(parent, name)
    return None


def _is_image(entry: os.DirEntry) -> bool:
    # "._name.jpg" is what macOS leaves beside a copied image: not an image.
    return entry.name.lower().endswith(IMAGE_EXTENSIONS) and not entry.name.startswith(".") and entry.is_file()


# Explaining what is missing


def _check_folder(path: Path) -> None:
    if path.is_dir():
        return
    if path.exists():
        hint = "; read arrays with eqvision.data.load_arrays" if path.suffix in (".npz", ".npy") else ""
        raise NotADirectoryError(f"{path} is a file; expected an image folder, {LAYOUT}{hint}")
    raise FileNotFoundError(f"image folder {path} does not exist; {nearest_existing(path)}")


def nearest_existing(path: Path) -> str:
    """Where a missing path stops existing, and which names there resemble the missing one."""
    parent = next(p for p in path.absolute().parents if p.is_dir())
    missing = path.absolute().relative_to(parent).parts[0]
    near = difflib.get_close_matches(missing, sorted(os.listdir(parent)), n=3)
    if near:
        return f"{parent} has no {missing!r}; did you mean {' or '.join(repr(n) for n in near)}?"
    return f"{parent} exists but has no {missing!r}; it contains: {_entries(parent)}"


def _refuse_unsplit(path: Path) -> None:
    present = [s for s in SPLITS if (path / s).is_dir()]
    if present and set(class_folders(path)) <= {*SPLITS}:
        raise ValueError(f"{path} holds the splits {', '.join(present)}; choose one: split={present[0]!r}")


def _missing_split(path: Path, split: str) -> str:
    present = [s for s in SPLITS if (path / s).is_dir()]
    if present:
        return f"{path} has no split {split!r}; it has: {', '.join(present)}"
    if path.name in SPLITS:
        return (
            f"{path} has no folder {split!r}; it looks like a split itself: pass its parent, path={str(path.parent)!r}"
        )
    inside = [path / name for name in class_folders(path) if (path / name / split).is_dir()]
    if inside:
        return f"{path} has no folder {split!r}, but {inside[0]} has: pass path={str(inside[0])!r}"
    if class_folders(path):
        return (
            f"{path} has no folder {split!r}; it contains: {_entries(path)}. "
            "If these are the class folders, pass split=None"
        )
    return f"{path} has no folder {split!r}; it contains: {_entries(path)}. Expected {LAYOUT}"


def _entries(folder: Path) -> str:
    names = sorted(e.name + "/" * e.is_dir() for e in os.scandir(folder))
    return ", ".join(names[:5]) + (f", ... ({len(names)} entries)" if len(names) > 5 else "") or "nothing"


def some_names(names: set[str]) -> str:
    """The first five of them, and how many there are, for a message."""
    shown = sorted(names)
    return ", ".join(shown[:5]) + (f", ... ({len(shown)})" if len(shown) > 5 else "") or "nothing"


# The cache: one JSON file per folder, valid while no folder's modification time has changed


def _read_cache(file: Path, root: Path) -> Listing | None:
    try:
        stored = json.loads(file.read_bytes())
        folders, files = stored["folders"], stored["files"]
        if stored["version"] != _VERSION or any(_mtime(root / name) != t for name, t in folders.items()):
            return None
        return Listing(tuple(files), tuple(map(tuple, files.values())))
    except FileNotFoundError:  # no listing yet, or a class folder has gone
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("ignored the unreadable listing %s (%s); reading %s again", file, error, root)
        return None


def _mtime(folder: Path) -> int:
    return os.stat(folder).st_mtime_ns
