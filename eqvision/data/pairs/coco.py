"""Captions of COCO, and of whatever else is written as COCO's captions files are."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eqvision.data.detection.layout import find_images
from eqvision.data.listing import SPLIT_NAMES, nearest_existing
from eqvision.data.pairs.files import CaptionedFiles, CaptionRow

LAYOUT = "ROOT/annotations/captions_train2017.json with ROOT/train2017/*.jpg, or the path of the JSON file"
_KEYS = '"images" (id, file_name) and "annotations" (image_id, caption)'


def coco_captions(
    path: str | os.PathLike,
    split: str | None = None,
    *,
    images: str | os.PathLike | None = None,
    in_channels: int = 3,
    on_corrupt: str = "raise",
) -> CaptionedFiles:
    """Images and captions of a COCO captions file (format: https://cocodataset.org/#format-data).

    ``path`` is the JSON file, or a folder in which ``captions*.json`` of the split (train, val, test) is looked for,
    here and in ``annotations``; ``images`` is the folder of the images where it is another than usual. Images come in
    the order of their first annotation; those without any are left out. Raises FileNotFoundError for missing files,
    ValueError for what is wrong in the file. See ``CaptionedFiles`` for empty captions.
    """
    file = find_captions(path, split)
    content = _load(file)
    names = _file_names(content["images"], file)
    rows = list(_rows(content["annotations"], names, file))
    if not rows:
        raise ValueError(f"{file} has no captions; expected lists {_KEYS}")
    root = find_images(file, [row.file for row in rows[:20]], images)
    return CaptionedFiles(rows, root, file, in_channels=in_channels, on_corrupt=on_corrupt)


def find_captions(path: str | os.PathLike, split: str | None = None) -> Path:
    """The captions file of a split. Raises FileNotFoundError where there is none, ValueError for several."""
    base = Path(path).expanduser().absolute()
    if base.is_file():
        return base
    if not base.is_dir():
        raise FileNotFoundError(f"{base} does not exist; {nearest_existing(base)}. Expected {LAYOUT}")
    files = sorted([*base.glob("*caption*.json"), *base.glob("annotations/*caption*.json")])
    mine = [file for file in files if split is None or _is_of(file, split)]
    if len(mine) == 1:
        return mine[0]
    shown = ", ".join(str(file.relative_to(base)) for file in (mine or files)[:5]) or "no captions*.json"
    which = "" if split is None else f" of split {split!r}"
    if mine:
        raise ValueError(f"{base} has several captions files{which}: {shown}; choose a split, or pass one file")
    raise FileNotFoundError(f"no captions{which} in {base}, which has {shown}. Expected {LAYOUT}")


def _is_of(file: Path, split: str) -> bool:
    words = re.findall("[a-z]+", file.stem.lower())
    return any(name in words for name in SPLIT_NAMES.get(split, (split,)))


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{file} has no list {key!r}; expected lists {_KEYS}")
    return content


def _file_names(images: list[Any], file: Path) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for place, row in enumerate(images):
        if not _has(row, "id", "file_name"):
            raise ValueError(f"{file}: images[{place}] is {json.dumps(row)[:60]}; expected id and file_name")
        if row["id"] in names:
            raise ValueError(f"{file}: images[{place}] has the id {row['id']}, which another image has, too")
        names[row["id"]] = row["file_name"]
    return names


def _rows(annotations: list[Any], names: dict[Any, str], file: Path) -> Iterator[CaptionRow]:
    for place, row in enumerate(annotations):
        if not _has(row, "image_id", "caption"):
            hint = "; it is of objects, not of captions" if isinstance(row, dict) and "bbox" in row else ""
            raise ValueError(f"{file}: annotations[{place}] has no image_id and caption{hint}: {json.dumps(row)[:60]}")
        if row["image_id"] not in names:
            raise ValueError(f"{file}: annotations[{place}] is of image {row['image_id']}, which is not in 'images'")
        yield CaptionRow(names[row["image_id"]], row["caption"])


def _has(row: Any, number: str, text: str) -> bool:
    return isinstance(row, dict) and isinstance(row.get(number), (int, str)) and isinstance(row.get(text), str)
