"""``eqvision data convert``: Pascal VOC and YOLO data sets as COCO instances JSON, which ``CocoDetection`` reads."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eqvision.data.cache import write_whole
from eqvision.data.detection.parsed import ParsedImage, ParsedObject, ParsedSet
from eqvision.data.detection.voc import parse_voc, voc_folder
from eqvision.data.detection.yolo import data_yaml, parse_yolo
from eqvision.data.listing import nearest_existing
from eqvision.names import nearest

FORMATS = ("voc", "yolo")


class Conversion(NamedTuple):
    """What has been written. ``num_crowd`` of the objects are ignored in training and evaluation."""

    file: Path
    kind: str
    num_images: int
    num_objects: int
    num_crowd: int
    class_names: tuple[str, ...]


def convert_to_coco(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    kind: str | None = None,
    split: str | None = None,
    images: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    coordinates: str = "one-based",
    force: bool = False,
) -> Conversion:
    """Write ``out`` from a data set of ``kind`` "voc" or "yolo" (default: what its files look like).

    File names in it are relative to its own folder. Category ids are labels + 1, annotation ids count from 1 (some
    evaluators take an id 0 for none). ``coordinates`` is for VOC; see there and in ``yolo.py`` for the other options.
    Raises FileExistsError where ``out`` exists, unless ``force``; and what the reader of the format raises.
    """
    base, target = Path(source).expanduser().absolute(), Path(out).expanduser().absolute()
    if target.suffix != ".json":
        raise ValueError(f"{target} does not end in .json; expected the file to write: SOURCE OUT.json")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; choose another name, or replace it with --force")
    kind = guess_format(base) if kind is None else kind
    folder = None if images is None else Path(images).expanduser().absolute()
    parsed = _parse(base, kind, split, folder, class_names, coordinates)
    _check_names(parsed.class_names)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(coco_of(parsed, target.parent, kind), ensure_ascii=False)
    write_whole(target, lambda f: f.write(content.encode("utf-8", "surrogateescape")))
    objects = [each for image in parsed.images for each in image.objects]
    crowd = sum(each.crowd for each in objects)
    return Conversion(target, kind, len(parsed.images), len(objects), crowd, parsed.class_names)


def guess_format(source: Path) -> str:
    """The format that files look like. Raises FileNotFoundError and ValueError."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; {nearest_existing(source)}")
    if source.suffix == ".json":
        raise ValueError(f"{source} is JSON already; CocoDetection reads COCO files as they are")
    if source.suffix in (".yaml", ".yml"):
        return "yolo"
    if voc_folder(source) is not None:
        return "voc"
    if data_yaml(source) is not None or any((source / name).exists() for name in ("labels", "classes.txt")):
        return "yolo"
    raise ValueError(
        f"{source} looks neither like Pascal VOC (Annotations/*.xml) nor like YOLO (data.yaml, labels/ or classes.txt)"
    )


def _parse(
    source: Path,
    kind: str,
    split: str | None,
    images: Path | None,
    class_names: Sequence[str] | None,
    coordinates: str,
) -> ParsedSet:
    if kind == "voc":
        return parse_voc(source, split=split, images=images, class_names=class_names, coordinates=coordinates)
    if kind == "yolo" and coordinates != "one-based":
        raise ValueError(f"coordinates={coordinates!r} is for Pascal VOC; YOLO files have shares of the image's size")
    if kind == "yolo":
        return parse_yolo(source, split=split, images=images, class_names=class_names)
    raise nearest(kind, list(FORMATS), "annotation format")


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"class names come twice: {', '.join(twice)}")
    if not names:
        raise ValueError("there is not a single object, so no classes are known; pass the names of the classes")


def coco_of(parsed: ParsedSet, folder: Path, kind: str) -> dict[str, Any]:
    """The content of the JSON file, with image paths relative to ``folder``."""
    numbers = {name: number for number, name in enumerate(parsed.class_names, 1)}
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(parsed.images, 1):
        for each in image.objects:
            annotations.append(_annotation(each, len(annotations) + 1, image_id, numbers[each.name]))
    return {
        "info": {"description": f"converted from {kind} by eqvision data convert"},
        "images": [_image(image, number, folder) for number, image in enumerate(parsed.images, 1)],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }


def _image(image: ParsedImage, number: int, folder: Path) -> dict[str, Any]:
    name = Path(os.path.relpath(image.file, folder)).as_posix()
    return {"id": number, "file_name": name, "width": image.width, "height": image.height}


def _annotation(each: ParsedObject, number: int, image_id: int, category: int) -> dict[str, Any]:
    left, top, right, bottom = each.box
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": [left, top, right - left, bottom - top],
        "area": each.area,
        "iscrowd": int(each.crowd),
        "segmentation": [] if each.polygon is None else [list(each.polygon)],
    }
