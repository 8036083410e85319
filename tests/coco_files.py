"""Small COCO data sets for tests: a JSON file with one of everything, and its images."""

import json
import os

from images import noise
from PIL import Image

HEIGHT, WIDTH = 24, 32
SQUARE = [[4, 4, 12, 4, 12, 12, 4, 12]]


def image_row(number, name=None, width=WIDTH, height=HEIGHT):
    return {"id": number, "file_name": name or f"{number}.png", "width": width, "height": height}


def annotation(number, image, category=1, box=(4, 4, 8, 8), **more):
    area = box[2] * box[3] if len(box) == 4 else 0
    return {
        "id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": area, "iscrowd": 0,
        "segmentation": SQUARE,
    } | more  # fmt: skip


def content(images=None, annotations=None, categories=None):
    """Three images in disorder; sparse categories 7, 1, 3; the second image has no objects."""
    return {
        "images": images or [image_row(30), image_row(10), image_row(20)],
        "annotations": annotations if annotations is not None else [annotation(5, 30, 3), annotation(6, 10, 7)],
        "categories": categories or [{"id": 7, "name": "c"}, {"id": 1, "name": "a"}, {"id": 3, "name": "b"}],
    }


def write_json(file, what, *, settled=True):
    """``settled``: old enough for its index to be cached."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(what if isinstance(what, str) else json.dumps(what))
    if settled:
        os.utime(file, (1_600_000_000, 1_600_000_000))
    return file


def write_set(root, what=None, split="train"):
    """ROOT/annotations/SPLIT.json and its images in ROOT/SPLIT; returns the JSON file."""
    what = what or content()
    for row in what["images"]:
        file = root / split / row["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise((row["height"], row["width"], 3), row["id"])).save(file)
    return write_json(root / "annotations" / f"{split}.json", what)
