"""YOLO text files: for each image a file of lines ``class cx cy w h``, or ``class x y x y x y ...`` for outlines.

Numbers are shares of the image's width and height, classes count from 0. Labels lie where Ultralytics looks for them:
beside the image, or with the last folder ``images`` of its path replaced by ``labels``.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eqvision.data.decode import IMAGE_EXTENSIONS
from eqvision.data.detection.parsed import ParsedImage, ParsedObject, ParsedSet, upright_size
from eqvision.data.listing import SPLIT_NAMES

log = logging.getLogger(__name__)

_SLACK = 0.01  # of the image: annotation tools round outwards; what is further out is not normalised
_LINE = "class cx cy w h, or class x y x y x y ..."


class Layout(NamedTuple):
    """What is known of a data set before its labels are read: images in order, and names by class number."""

    images: tuple[Path, ...]
    class_names: tuple[str, ...]


def parse_yolo(
    source: Path, *, split: str | None = None, images: Path | None = None, class_names: Sequence[str] | None = None
) -> ParsedSet:
    """Read a data set: ``source`` is its data.yaml or its folder.

    Names come from ``class_names``, else data.yaml (``names``: a list, or a mapping from numbers), else classes.txt.
    Images of ``split`` are those that data.yaml names, else those in ``images/SPLIT`` or ``SPLIT/images``; without a
    split all images below ``images`` or the folder. An image without a label file has no objects. The area of an
    outline is that of the polygon. Raises FileNotFoundError, and ValueError with file and line.
    """
    from tqdm import tqdm

    layout = find_yolo(source, split=split, images=images, class_names=class_names)
    bar = tqdm(layout.images, "reading labels", unit="image", dynamic_ncols=True, delay=1)
    parsed = tuple(_image(file, layout.class_names) for file in bar)
    unlabelled = sum(not label_file(image.file).is_file() for image in parsed)
    if unlabelled == len(parsed):
        raise FileNotFoundError(f"no image has labels: {parsed[0].file} should have {label_file(parsed[0].file)}")
    if unlabelled:
        log.warning("%s: %d of %d images have no label file, so no objects", source, unlabelled, len(parsed))
    return ParsedSet(layout.class_names, parsed)


def label_file(image: Path) -> Path:
    """Where the labels of an image lie."""
    parts = list(image.with_suffix(".txt").parts)
    places = [place for place, part in enumerate(parts[:-1]) if part == "images"]
    beside = image.with_suffix(".txt")
    if not places or beside.is_file():
        return beside
    parts[places[-1]] = "labels"
    return Path(*parts)


# The folder


def find_yolo(source: Path, *, split: str | None, images: Path | None, class_names: Sequence[str] | None) -> Layout:
    """Which images a data set has, and the names of its classes."""
    file = data_yaml(source)
    root = source.parent if source.is_file() else source
    content = _read_yaml(file) if file is not None else {}
    names = tuple(class_names) if class_names else _names(content, file, root)
    places = [images] if images is not None else _places(content, file, root, split)
    found = tuple(image for place in places for image in _images_at(place))
    if not found:
        raise FileNotFoundError(f"no images in {', '.join(map(str, places))} (extensions {' '.join(IMAGE_EXTENSIONS)})")
    return Layout(found, names)


def data_yaml(source: Path) -> Path | None:
    """The data.yaml of a data set, or None."""
    if source.is_file():
        return source
    found = [source / name for name in ("data.yaml", "data.yml", "dataset.yaml") if (source / name).is_file()]
    return found[0] if found else None


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected train, val and names")
    return content


def _names(content: dict[str, Any], file: Path | None, root: Path) -> tuple[str, ...]:
    names = content.get("names")
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"{file}: names has the keys {sorted(names, key=str)[:8]}; expected 0..{len(names) - 1}")
        return tuple(str(names[number]) for number in range(len(names)))
    if isinstance(names, list) and names:
        return tuple(map(str, names))
    for listed in (root / "classes.txt", root / "labels" / "classes.txt", root / "obj.names"):
        if listed.is_file():
            return tuple(line.strip() for line in listed.read_text().splitlines() if line.strip())
    where = f"{file} has no names" if file is not None else f"{root} has no data.yaml"
    raise FileNotFoundError(f"{where} and there is no {root / 'classes.txt'}; pass the names of the classes")


def _places(content: dict[str, Any], file: Path | None, root: Path, split: str | None) -> list[Path]:
    listed = {key: content[name] for key, names in SPLIT_NAMES.items() for name in names if content.get(name)}
    if split is None:
        if len(listed) > 1:
            raise ValueError(f"{file} has the splits {', '.join(listed)}; choose one: split={next(iter(listed))!r}")
        inside = [root / "images"] if (root / "images").is_dir() else [root]
        return _resolve(next(iter(listed.values())), content, root) if listed else inside
    if listed and split not in listed:
        raise ValueError(f"{file} has no split {split!r}; it has {', '.join(listed)}")
    if listed:
        return _resolve(listed[split], content, root)
    folders = [root.joinpath(*parts) for name in SPLIT_NAMES.get(split, (split,))
               for parts in (("images", name), (name, "images"), (name,))]  # fmt: skip
    for folder in folders:
        if folder.is_dir():
            return [folder]
    raise FileNotFoundError(f"no images of split {split!r}: there is none of {', '.join(map(str, folders))}")


def _resolve(values: Any, content: dict[str, Any], root: Path) -> list[Path]:
    """Folders or lists of images as data.yaml names them: relative to its ``path``, or to its own folder.

    Roboflow writes ``../train/images`` for what lies in ``train/images`` beside data.yaml.
    """
    base = root / str(content.get("path") or "")
    found = []
    for value in values if isinstance(values, list) else [values]:
        own = str(value).removeprefix("../")
        tried = list(dict.fromkeys(each / str(value) for each in (base, root))) + [root / own]
        existing = [each for each in tried if each.exists()]
        if not existing:
            raise FileNotFoundError(f"data.yaml in {root} names {value!r}; none exists of {', '.join(map(str, tried))}")
        found.append(Path(os.path.normpath(existing[0])))  # not resolve: labels lie beside links
    return found


def _images_at(place: Path) -> Iterator[Path]:
    """The images of a folder and below, sorted, or those that a text file lists."""
    if place.is_file():
        for number, line in enumerate(place.read_text().splitlines(), 1):
            if line.strip():
                image = place.parent / line.strip()
                if not image.is_file():
                    raise FileNotFoundError(f"{place}:{number}: image {image} does not exist")
                yield image
        return
    for file in sorted(place.rglob("*")):
        if file.suffix.lower() in IMAGE_EXTENSIONS and not file.name.startswith("."):
            yield file


# The labels


def _image(file: Path, names: tuple[str, ...]) -> ParsedImage:
    height, width = upright_size(file)
    labels = label_file(file)
    if not labels.is_file():
        return ParsedImage(file, height, width, ())
    lines = enumerate(labels.read_text().splitlines(), 1)
    objects = (_object(line, f"{labels}:{number}", names, height, width) for number, line in lines if line.strip())
    return ParsedImage(file, height, width, tuple(objects))


def _object(line: str, place: str, names: tuple[str, ...], height: int, width: int) -> ParsedObject:
    words = line.split()
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{place}: {line.strip()[:60]!r} are not all numbers; expected {_LINE}") from None
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        hint = "; is it a file of predictions, with a score?" if len(values) == 6 else ""
        raise ValueError(f"{place}: {len(values)} numbers; expected {_LINE}{hint}")
    name = _class_name(values[0], words[0], place, names)
    outside = [value for value in values[1:] if not -_SLACK <= value <= 1 + _SLACK]
    if outside or not all(map(math.isfinite, values)):
        shown = outside[0] if outside else math.nan
        raise ValueError(f"{place}: coordinate {shown:g} is not within 0..1; expected shares of width and height")
    if len(values) == 5:
        return _box(name, values[1:], place, height, width)
    return _outline(name, values[1:], height, width)


def _class_name(value: float, word: str, place: str, names: tuple[str, ...]) -> str:
    if not value.is_integer() or not 0 <= value < len(names):
        raise ValueError(
            f"{place}: class {word} does not exist; there are {len(names)}, from 0 ({names[0]}) "
            f"to {len(names) - 1} ({names[-1]})"
        )
    return names[int(value)]


def _box(name: str, values: list[float], place: str, height: int, width: int) -> ParsedObject:
    x, y, box_width, box_height = values[0] * width, values[1] * height, values[2] * width, values[3] * height
    if min(box_width, box_height) < 0:
        raise ValueError(f"{place}: a box of width {values[2]:g} and height {values[3]:g}; expected 0 or more")
    left, top = x - box_width / 2, y - box_height / 2
    return ParsedObject(name, (left, top, left + box_width, top + box_height), box_width * box_height)


def _outline(name: str, values: list[float], height: int, width: int) -> ParsedObject:
    x, y = [value * width for value in values[::2]], [value * height for value in values[1::2]]
    following = list(zip(x[1:] + x[:1], y[1:] + y[:1], strict=True))
    doubled = sum(x0 * y1 - x1 * y0 for x0, y0, (x1, y1) in zip(x, y, following, strict=True))
    polygon = tuple(value for point in zip(x, y, strict=True) for value in point)
    return ParsedObject(name, (min(x), min(y), max(x), max(y)), abs(doubled) / 2, polygon=polygon)
