"""Where a COCO data set has its JSON file and its images.

Users have ``ROOT/annotations/instances_train2017.json`` with ``ROOT/train2017/*.jpg``, ``ROOT/annotations/train.json``
with ``ROOT/train/*.jpg`` or ``ROOT/images/*.jpg``, and ``ROOT/train/_annotations.coco.json`` beside its images.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from eqvision.data.listing import SPLIT_NAMES, SPLITS, nearest_existing

LAYOUT = "ROOT/annotations/{train,val,test}.json with ROOT/{train,val,test}/*.jpg, or the path of the JSON file"
_OTHER_TASKS = {"captions", "person", "keypoints", "panoptic", "stuff", "image", "info"}  # of COCO's own downloads


def find_json(path: str | os.PathLike, split: str | None = None) -> Path:
    """The annotations of a split: ``path`` itself if it is a file, else the one that has the split's name.

    Raises FileNotFoundError where there is none, ValueError where there are several or the split is unknown.
    """
    base = Path(path).expanduser().absolute()
    if split is not None and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}, or None")
    if base.is_file() and split is not None:
        raise ValueError(f"{base} is one file; split={split!r} is for folders with several: pass split=None")
    if base.is_file():
        return base
    if not base.is_dir():
        raise FileNotFoundError(f"{base} does not exist; {nearest_existing(base)}. Expected {LAYOUT}")
    files = _json_files(base)
    mine = files if split is None else [file for file in files if _has_split(file, base, split)]
    if len(mine) == 1:
        return mine[0]
    shown = ", ".join(str(file.relative_to(base)) for file in (mine or files)[:5]) or "no JSON files"
    which = "" if split is None else f" of split {split!r}"
    if mine:
        raise ValueError(f"{base} has several annotations{which}: {shown}; choose a split, or pass one file")
    raise FileNotFoundError(f"no annotations{which} in {base}, which has {shown}. Expected {LAYOUT}")


def _json_files(base: Path) -> list[Path]:
    found = [*base.glob("*.json"), *base.glob("annotations/*.json"), *base.glob("*/_annotations.coco.json")]
    return sorted(file for file in found if not _OTHER_TASKS.intersection(_words(file.stem)))


def _has_split(file: Path, base: Path, split: str) -> bool:
    words = _words(str(file.relative_to(base).with_suffix("")))
    return any(name in words for name in SPLIT_NAMES[split])


def _words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


def find_images(file: Path, names: Sequence[str], images: str | os.PathLike | None = None) -> Path:
    """The folder below which the images of a JSON file lie: ``images``, else the first likely one that has some.

    ``names`` are a few of them. Raises FileNotFoundError with the folders that were looked at.
    """
    if images is not None:
        folder = Path(images).expanduser().absolute()
        if not folder.is_dir():
            raise FileNotFoundError(f"image folder {folder} does not exist; {nearest_existing(folder)}")
        return folder
    candidates = list(dict.fromkeys(_image_folders(file)))
    for folder in candidates:
        if any((folder / name).is_file() for name in names):
            return folder
    looked = ", ".join(str(folder) for folder in candidates if folder.is_dir())
    raise FileNotFoundError(f"the images of {file}, such as {names[0]!r}, are in none of {looked}; pass images=FOLDER")


def _image_folders(file: Path) -> Iterator[Path]:
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    last_word = re.split("[_.-]", file.stem)[-1]  # instances_train2017 -> train2017
    splits = [name for each in SPLITS if _has_split(file, file.parent, each) for name in SPLIT_NAMES[each]]
    yield file.parent  # what `eqvision data convert` writes, and Roboflow
    for name in (file.stem, last_word, *splits):
        yield root / name
        yield root / "images" / name
        yield root / name / "images"
    yield root / "images"
    yield root
    yield root.parent  # LVIS beside COCO: file names have the split's folder in them


def refuse_missing(root: Path, names: Sequence[str], file: Path) -> None:
    """Raise FileNotFoundError where images are missing; the message has their absolute paths.

    Looks into each folder once, which for 100,000 images is much quicker than asking for each.
    """
    folders: dict[str, set[str]] = defaultdict(set)
    for name in names:
        folder, _, base = name.rpartition(os.sep)
        folders[folder].add(base)
    missing = [os.path.join(root, folder, base) for folder, bases in folders.items()
               for base in sorted(bases - _names_in(root / folder))]  # fmt: skip
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise FileNotFoundError(f"{len(missing)} of {len(names)} images named in {file} do not exist: {shown}")


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
