"""Pascal VOC and YOLO to COCO: which pixels a box means, where files lie, and what wrong ones say."""

import json
import logging
import re

import numpy as np
import pytest
from images import noise
from PIL import Image

from eqvision.cli import main
from eqvision.data import CorruptImageError
from eqvision.data.detection import CocoDetection, convert_to_coco

HEIGHT, WIDTH = 20, 40


def write_image(file, height=HEIGHT, width=WIDTH, **more):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise((height, width, 3))).save(file, **more)
    return file


def converted(*arguments, **options):
    done = convert_to_coco(*arguments, **options)
    return done, json.loads(done.file.read_text())


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(["data", *map(str, arguments)])
    assert caught.value.code == 2
    return capsys.readouterr().err


# Pascal VOC


def voc_object(name, box, difficult=0):
    keys = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    part = "<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part>"
    inside = "".join(f"<{key}>{value}</{key}>" for key, value in keys)
    return (
        f"<object>\n<name>{name}</name>{part}<difficult>{difficult}</difficult>\n<bndbox>{inside}</bndbox>\n</object>\n"
    )


def write_voc(root, name, *objects, width=WIDTH, height=HEIGHT, filename=None):
    write_image(root / "JPEGImages" / f"{name}.jpg")
    file = root / "Annotations" / f"{name}.xml"
    file.parent.mkdir(exist_ok=True)
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    named = f"<filename>{filename or f'{name}.jpg'}</filename>"
    file.write_text(f"<annotation>\n{named}\n{size}\n{''.join(objects)}</annotation>\n")
    return file


def test_voc_pixels_are_counted_from_1(tmp_path):
    root = tmp_path / "VOC2012"
    write_voc(root, "b", voc_object("dog", (1, 1, 40, 20)), voc_object("cat", (3, 4, 3, 6), difficult=1))
    write_voc(root, "a")
    done, content = converted(root, tmp_path / "out" / "voc.json")
    assert done[1:] == ("voc", 2, 2, 1, ("cat", "dog"))
    assert [row["file_name"] for row in content["images"]] == [f"../VOC2012/JPEGImages/{n}.jpg" for n in "ab"]
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    dog, cat = content["annotations"]
    assert (dog["bbox"], dog["area"], dog["iscrowd"], dog["category_id"]) == ([0, 0, 40, 20], 800, 0, 2)
    assert (cat["bbox"], cat["area"], cat["iscrowd"], cat["image_id"]) == ([2, 3, 1, 3], 3, 1, 2)
    assert [dog["id"], cat["id"]] == [1, 2]
    source = CocoDetection(done.file)
    assert source.class_names == ("cat", "dog")
    np.testing.assert_array_equal(source[1].boxes, [[0, 0, 40, 20]])
    assert source.annotations(1).iscrowd.tolist() == [False, True]
    assert source[0].boxes.shape == (0, 4)


def test_voc_boxes_as_edges(tmp_path):
    write_voc(tmp_path, "a", voc_object("dog", (1.5, 0, 40, 20)))
    _, content = converted(tmp_path, tmp_path / "voc.json", coordinates="edges")
    assert content["annotations"][0]["bbox"] == [1.5, 0, 38.5, 20]
    with pytest.raises(ValueError, match="coordinates='zero'; expected 'one-based' or 'edges'"):
        convert_to_coco(tmp_path, tmp_path / "more.json", coordinates="zero")


def test_voc_splits_share_their_classes(tmp_path):
    write_voc(tmp_path, "a", voc_object("dog", (1, 1, 4, 4)))
    write_voc(tmp_path, "b", voc_object("cat", (1, 1, 4, 4)))
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a 1\n\n")
    done, content = converted(tmp_path, tmp_path / "train.json", split="train")
    assert (done.num_images, done.class_names) == (1, ("cat", "dog"))
    assert content["annotations"][0]["category_id"] == 2
    with pytest.raises(FileNotFoundError, match=r"no list .*val.txt of split 'val'; lists there: train"):
        convert_to_coco(tmp_path, tmp_path / "val.json", split="val")
    (lists / "val.txt").write_text("b\nc\n")
    with pytest.raises(FileNotFoundError, match=r"1 images of split 'val' have no XML file, such as .*c.xml"):
        convert_to_coco(tmp_path, tmp_path / "val.json", split="val")


def test_voc_given_classes(tmp_path):
    file = write_voc(tmp_path, "a", voc_object("dog", (1, 1, 4, 4)))
    done, content = converted(tmp_path, tmp_path / "o.json", class_names=("owl", "dog"))
    assert (done.class_names, content["annotations"][0]["category_id"]) == (("owl", "dog"), 2)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}:4: class 'dog' does not exist; nearest: dogs"):
        convert_to_coco(tmp_path, tmp_path / "p.json", class_names=("dogs",))


def test_voc_images_renamed_and_sizes_missing(tmp_path):
    write_voc(tmp_path, "a", filename="old name.jpg", width=0, height=0)
    turned = write_voc(tmp_path, "b", width=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "JPEGImages" / "b.jpg", WIDTH, HEIGHT, exif=exif)
    _, content = converted(tmp_path, tmp_path / "o.json", class_names=("x",))
    assert [(row["width"], row["height"]) for row in content["images"]] == [(WIDTH, HEIGHT)] * 2
    assert CocoDetection(tmp_path / "o.json")[1].image.shape == (HEIGHT, WIDTH, 3)
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=rf"image of {re.escape(str(turned))} \(b.jpg\) is in none of .*JPEGIm"):
        convert_to_coco(tmp_path, tmp_path / "p.json", class_names=("x",))
    (tmp_path / "JPEGImages" / "b.jpg").write_bytes(b"no image")
    with pytest.raises(CorruptImageError, match=r"corrupt image .*b.jpg: its size cannot be read"):
        convert_to_coco(tmp_path, tmp_path / "p.json", class_names=("x",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>\n<object>\n</annotation>", ":3: not XML: mismatched tag"),
        ("<html></html>", ":1: the root is <html>, not <annotation> of VOC"),
        ("<annotation>\n<object>\n</object></annotation>", ":2: <object> has no <name>"),
        ("<annotation>\n<object><name>a</name></object></annotation>", ":2: object 'a' has no <bndbox>"),
        (f"<annotation>\n{voc_object('a', (1, 2, 'x', 4))}</annotation>", ":4: <xmax> is 'x'; expected a number"),
        (f"<annotation>\n{voc_object('a', (1, 'nan', 3, 4))}</annotation>", ":4: <ymin> is 'nan'; expected a number"),
        (f"<annotation>\n{voc_object('a', (9, 2, 3, 4))}</annotation>", r":4: <bndbox> from \(9, 2\) to \(3, 4\)"),
    ],
)
def test_wrong_xml(tmp_path, text, message):
    file = write_voc(tmp_path, "a")
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(file)) + message):
        convert_to_coco(tmp_path, tmp_path / "o.json")
    assert not (tmp_path / "o.json").exists()


# YOLO


def write_yolo(root, split, name, text, names=("cat", "dog")):
    write_image(root / "images" / split / f"{name}.png")
    labels = root / "labels" / split / f"{name}.txt"
    labels.parent.mkdir(parents=True, exist_ok=True)
    if text is not None:
        labels.write_text(text)
    if names:
        (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {list(names)}\n")
    return labels


def test_yolo_boxes_and_outlines(tmp_path, caplog):
    write_yolo(tmp_path, "train", "a", "1 0.5 0.5 0.25 0.5\n\n0 0.1 0.2 0.6 0.2 0.6 0.7\n")
    write_yolo(tmp_path, "train", "b", "")
    write_yolo(tmp_path, "train", "c", None)
    with caplog.at_level(logging.WARNING):
        done, content = converted(tmp_path, tmp_path / "train.json", split="train")
    assert "1 of 3 images have no label file, so no objects" in caplog.text
    assert done[1:] == ("yolo", 3, 2, 0, ("cat", "dog"))
    dog, cat = content["annotations"]
    assert (dog["bbox"], dog["area"], dog["category_id"], dog["segmentation"]) == ([15, 5, 10, 10], 100, 2, [])
    np.testing.assert_allclose(cat["bbox"], [4, 4, 20, 10])
    np.testing.assert_allclose(cat["area"], 100)
    np.testing.assert_allclose(cat["segmentation"], [[4, 4, 24, 4, 24, 14]])
    source = CocoDetection(done.file, masks=True, without_mask="drop")
    assert source[0].labels.tolist() == [0]
    assert 90 <= source[0].masks.sum() <= 110


@pytest.mark.parametrize("layout", ["images/SPLIT", "SPLIT/images", "beside", "list", "roboflow", "path"])
def test_yolo_layouts(tmp_path, layout):
    places = {"SPLIT/images": ("val/images", "val/labels"), "beside": ("val", "val")}
    images, labels = places.get(layout, ("images/val", "labels/val"))
    root = tmp_path / "set" if layout == "path" else tmp_path
    write_image(root / images / "a.png")
    (root / labels).mkdir(parents=True, exist_ok=True)
    (root / labels / "a.txt").write_text("0 0.5 0.5 1 1")
    if layout == "list":
        (root / "val.txt").write_text("./images/val/a.png\n\n")
    values = {"list": "val.txt", "roboflow": "../images/val", "path": ["images/val"]}
    if layout in values:
        path = "path: set\n" if layout == "path" else ""
        (tmp_path / "data.yaml").write_text(f"{path}val: {values[layout]}\nnames: {{0: thing}}\n")
    else:
        (tmp_path / "classes.txt").write_text("thing\n")
    done = convert_to_coco(tmp_path, tmp_path / "o.json", split="val", kind="yolo")
    np.testing.assert_array_equal(CocoDetection(done.file)[0].boxes, [[0, 0, WIDTH, HEIGHT]])
    assert done.class_names == ("thing",)
    with pytest.raises((ValueError, FileNotFoundError), match="split 'test'"):
        convert_to_coco(tmp_path, tmp_path / "p.json", split="test", kind="yolo")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 x 1", r":2: '0 0.5 0.5 x 1' are not all numbers; expected class cx cy w h"),
        ("0 0.5 0.5 1", ":2: 4 numbers; expected class cx cy w h, or class x y"),
        ("0 0.5 0.5 1 1 0.9", ":2: 6 numbers; .* is it a file of predictions, with a score"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", ":2: 8 numbers"),
        ("2 0.5 0.5 1 1", r":2: class 2 does not exist; there are 2, from 0 \(cat\) to 1 \(dog\)"),
        ("-1 0.5 0.5 1 1", ":2: class -1 does not exist"),
        ("0.5 0.5 0.5 1 1", ":2: class 0.5 does not exist"),
        ("0 20 10 5 5", r":2: coordinate 20 is not within 0..1; expected shares"),
        ("0 nan 0.5 1 1", ":2: coordinate nan is not within"),
        ("0 0.5 0.5 -0.005 1", ":2: a box of width -0.005 and height 1"),
    ],
)
def test_wrong_yolo_lines(tmp_path, line, message):
    labels = write_yolo(tmp_path, "train", "a", f"0 0.5 0.5 1 1\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(str(labels)) + message):
        convert_to_coco(tmp_path, tmp_path / "o.json", split="train")


def test_yolo_without_names_labels_or_images(tmp_path):
    write_yolo(tmp_path, "train", "a", None)
    with pytest.raises(ValueError, match=r"coordinates='edges' is for Pascal VOC"):
        convert_to_coco(tmp_path, tmp_path / "o.json", split="train", coordinates="edges")
    with pytest.raises(FileNotFoundError, match=r"no image has labels: .*a.png should have .*labels/train/a.txt"):
        convert_to_coco(tmp_path, tmp_path / "o.json", split="train")
    with pytest.raises(ValueError, match=r"data.yaml has the splits train, val; choose one: split='train'"):
        convert_to_coco(tmp_path, tmp_path / "o.json")
    with pytest.raises(FileNotFoundError, match=r"names 'images/val'; none exists of .*images/val"):
        convert_to_coco(tmp_path, tmp_path / "o.json", split="val")
    (tmp_path / "data.yaml").write_text("train: [\n")
    with pytest.raises(ValueError, match=r"data.yaml is no YAML"):
        convert_to_coco(tmp_path, tmp_path / "o.json", split="train")
    (tmp_path / "data.yaml").write_text("names: {0: a, 2: b}")
    with pytest.raises(ValueError, match=r"names has the keys \[0, 2\]; expected 0..1"):
        convert_to_coco(tmp_path, tmp_path / "o.json", split="train")
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no data.yaml and there is no .*classes.txt; pass the names"):
        convert_to_coco(tmp_path, tmp_path / "o.json", split="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in .*empty \(extensions .jpg"):
        convert_to_coco(tmp_path, tmp_path / "o.json", images=tmp_path / "empty", class_names=("a",))


# The command


def test_the_command(tmp_path, capsys):
    write_voc(tmp_path, "a", voc_object("dog", (1, 1, 4, 4)), voc_object("cat", (1, 1, 4, 4), difficult=1))
    main(["data", "convert", str(tmp_path), str(tmp_path / "o.json")])
    printed = capsys.readouterr().out.splitlines()
    expected = [
        "voc: 1 images, 2 objects (1 difficult, ignored)",
        "2 classes: cat, dog",
        f"written: {tmp_path / 'o.json'}",
    ]
    assert printed == expected
    before = (tmp_path / "o.json").read_bytes()
    assert "o.json exists; choose another name, or replace it with --force" in refused(
        capsys, "convert", tmp_path, tmp_path / "o.json", "--class-names", "dog", "cat"
    )
    assert (tmp_path / "o.json").read_bytes() == before
    main(["data", "convert", str(tmp_path), str(tmp_path / "o.json"), "--class-names", "dog", "cat", "--force"])
    assert "2 classes: dog, cat" in capsys.readouterr().out


def test_what_the_command_refuses(tmp_path, capsys):
    (tmp_path / "x").mkdir()
    write_image(tmp_path / "labels" / "no.png")
    out = tmp_path / "o.json"
    assert "voc.jsn does not end in .json" in refused(capsys, "convert", tmp_path, tmp_path / "voc.jsn")
    assert "looks neither like Pascal VOC" in refused(capsys, "convert", tmp_path / "x", out)
    assert "contains: labels/, x/" in refused(capsys, "convert", tmp_path / "nothing", out)
    (tmp_path / "a.json").write_text("{}")
    assert "a.json is JSON already" in refused(capsys, "convert", tmp_path / "a.json", out)
    assert "no XML files in" in refused(capsys, "convert", tmp_path / "x", out, "--kind", "voc")
    assert "nearest: convert" in refused(capsys, "conver", tmp_path, out)
    write_voc(tmp_path / "v", "a")
    assert "not a single object, so no classes are known" in refused(capsys, "convert", tmp_path / "v", out)
    named = ("--class-names", "a", "b", "a")
    assert "class names come twice: a" in refused(capsys, "convert", tmp_path / "v", out, *named)
    assert not out.exists()
