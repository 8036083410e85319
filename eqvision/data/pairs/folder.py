"""A folder of images with captions in one file, or in a text file beside each image."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from eqvision.data.decode import IMAGE_EXTENSIONS
from eqvision.data.listing import nearest_existing
from eqvision.data.pairs.files import CaptionedFiles, CaptionRow

LAYOUT = (
    'ROOT/SPLIT/captions.jsonl (lines {"image": FILE, "caption": TEXT}), ROOT/SPLIT/captions.tsv (FILE, a tab, TEXT), '
    "or ROOT/SPLIT/NAME.txt beside each NAME.jpg"
)
IMAGE_KEYS = ("image", "file_name", "file", "filepath")
TEXT_KEYS = ("caption", "captions", "text", "title")


def captioned_folder(
    path: str | os.PathLike, split: str | None = None, *, in_channels: int = 3, on_corrupt: str = "raise"
) -> CaptionedFiles:
    """The images of ``PATH/SPLIT`` (of ``PATH`` where ``split`` is None) and what is said of them.

    Captions are read from ``captions.jsonl`` or ``metadata.jsonl`` (objects with the image's file under ``image``,
    ``file_name``, ``file`` or ``filepath``, and a text or a list of texts under ``caption``, ``captions``, ``text`` or
    ``title``), or from ``captions.tsv`` (file, tab, text; a first line such as ``image<tab>caption`` is a heading).
    Several lines may name one image. Without such a file the captions of ``NAME.jpg`` are the lines of ``NAME.txt``
    beside it, here and in folders below; images without one are left out. Files are relative to ``PATH/SPLIT``.
    Raises FileNotFoundError where there are no captions or images are missing, and ValueError, naming the line, for
    what cannot be read, and where several files have captions. See ``CaptionedFiles`` for empty captions.
    """
    root = _folder(Path(path).expanduser().absolute(), split)
    found = [root / name for name in READERS if (root / name).is_file()]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{root} has captions in {names}; keep one of them")
    if found:
        rows = READERS[found[0].name](found[0])
        return CaptionedFiles(rows, root, found[0], in_channels=in_channels, on_corrupt=on_corrupt)
    files = list(_text_files(root))
    if not files:
        raise FileNotFoundError(f"no captions in {root}; expected {LAYOUT}")
    rows = (row for file in files for row in _read_text(*file, root))
    return CaptionedFiles(rows, root, root, in_channels=in_channels, on_corrupt=on_corrupt)


def _folder(base: Path, split: str | None) -> Path:
    root = base if split is None else base / split
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; {nearest_existing(root)}. Expected {LAYOUT}")
    return root


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered from 1, without those that are blank."""
    with file.open(encoding="utf-8-sig", newline="\n") as opened:
        try:
            for number, line in enumerate(opened, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error}") from error


def _read_jsonl(file: Path) -> Iterator[CaptionRow]:
    for number, line in _lines(file):
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
        name, text = _value(row, IMAGE_KEYS, where), _value(row, TEXT_KEYS, where)
        for caption in text if isinstance(text, list) else [text]:
            yield CaptionRow(_text(name, where), _text(caption, where))


def _value(row: Any, keys: tuple[str, ...], where: str) -> Any:
    given = [key for key in keys if isinstance(row, dict) and key in row]
    if len(given) != 1:
        has = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: expected an object with one of the keys {', '.join(keys)}, got {has}")
    return row[given[0]]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected text, got {json.dumps(value)[:60]}")
    return value


def _read_tsv(file: Path) -> Iterator[CaptionRow]:
    for number, line in _lines(file):
        name, tab, caption = line.partition("\t")
        if not tab:
            raise ValueError(f"{file}:{number}: no tab in {line[:60]!r}; expected FILE, a tab and the caption")
        if number > 1 or name not in IMAGE_KEYS:
            yield CaptionRow(name, caption)


READERS: dict[str, Callable[[Path], Iterator[CaptionRow]]] = {
    "captions.jsonl": _read_jsonl,
    "metadata.jsonl": _read_jsonl,
    "captions.tsv": _read_tsv,
}


def _text_files(root: Path) -> Iterator[tuple[Path, Path]]:
    """Images with the text file beside each, sorted."""
    for parent, folders, names in os.walk(root):
        folders.sort()
        present = set(names)
        for name in sorted(names):
            text = f"{Path(name).stem}.txt"
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".") and text in present:
                yield Path(parent, name), Path(parent, text)


def _read_text(image: Path, text: Path, root: Path) -> Iterator[CaptionRow]:
    name = str(image.relative_to(root))
    lines = [line for _, line in _lines(text)]
    for line in lines or [""]:
        yield CaptionRow(name, line)
