"""The COCO reader: what it gives, what it leaves out, its index, and what wrong files say."""

import copy
import logging
import pickle
import re

import numpy as np
import pytest
from coco_files import HEIGHT, SQUARE, WIDTH, annotation, content, image_row, write_json, write_set
from images import noise
from PIL import Image

from eqvision.data import CorruptImageError
from eqvision.data.detection import (
    Categories,
    CocoDetection,
    CompressedRLE,
    DetectionExample,
    Dropped,
    Polygons,
    UncompressedRLE,
    encode_mask,
    open_index,
)
from eqvision.data.detection import coco_json as coco_json_module
from eqvision.data.detection.source import DetectionSource

# What is read


def test_sparse_categories_and_images_without_objects(tmp_path):
    write_set(tmp_path)
    source = CocoDetection(tmp_path, "train")
    assert isinstance(source, DetectionSource)
    assert (source.class_names, source.category_ids) == (("a", "b", "c"), (1, 3, 7))
    assert len(source) == 3
    np.testing.assert_array_equal(source.image_ids, [10, 20, 30])
    np.testing.assert_array_equal(source.num_objects, [1, 0, 1])
    np.testing.assert_array_equal(source.sizes, [[HEIGHT, WIDTH]] * 3)
    first, empty, last = (source[i] for i in range(3))
    assert (first.image_id, first.index, first.original_size, first.weight) == (10, 0, (HEIGHT, WIDTH), 1.0)
    np.testing.assert_array_equal(first.image, noise((HEIGHT, WIDTH, 3), 10))
    np.testing.assert_array_equal(first.boxes, [[4, 4, 12, 12]])
    assert (first.boxes.dtype, first.labels.dtype) == (np.float32, np.int32)
    assert (first.labels.tolist(), last.labels.tolist()) == ([2], [1])
    assert first.masks is None
    assert (empty.boxes.shape, empty.labels.shape, empty.weight) == ((0, 4), (0,), 1.0)
    assert source.describe(2) == str(tmp_path / "train" / "30.png")
    assert source[-1].image_id == 30
    with pytest.raises(IndexError):
        source[3]


def test_images_without_objects_can_be_left_out(tmp_path):
    rows = [annotation(1, 30), annotation(2, 10, iscrowd=1), annotation(3, 20, box=(0, 0, 0, 5))]
    write_set(tmp_path, content(annotations=rows))
    source = CocoDetection(tmp_path, "train", keep_empty=False)
    assert source.image_ids.tolist() == [30]
    assert (source[0].image_id, source[0].index) == (30, 0)
    assert source.describe(0).endswith("30.png")
    kept = CocoDetection(tmp_path, "train", keep_empty=False, crowd="keep")
    assert kept.image_ids.tolist() == [10, 30]


def test_boxes_are_clipped_and_what_is_left_out_is_counted(tmp_path):
    boxes = {
        1: (-3, -2, 8, 8),  # over the corner
        2: (28, 20, 100, 100),
        3: (5, 5, 0, 4),  # no width
        4: (5, 5, 4, -1),
        5: (WIDTH, 0, 5, 5),  # beside the image
        6: (-9, 0, 5, 5),
        7: (1.5, 2.25, 3.5, 4.5),
    }
    rows = [annotation(number, 10, box=box) for number, box in boxes.items()]
    rows += [annotation(8, 10, iscrowd=1), annotation(9, 10, segmentation=[])]
    write_set(tmp_path, content(annotations=rows))
    source = CocoDetection(tmp_path, "train")
    assert source.dropped == Dropped(empty_boxes=2, outside=2, crowd=1, no_mask=0)
    expected = [[0, 0, 5, 6], [28, 20, WIDTH, HEIGHT], [1.5, 2.25, 5, 6.75], [4, 4, 12, 12]]
    np.testing.assert_array_equal(source[0].boxes, expected)
    with_crowd = source.annotations(0)
    assert with_crowd.ids.tolist() == [1, 2, 7, 8, 9]
    assert with_crowd.iscrowd.tolist() == [False, False, False, True, False]
    truth = source.truth(0)
    assert truth.ids.tolist() == list(range(1, 10))
    np.testing.assert_array_equal(truth.boxes[:2], [[-3, -2, 5, 6], [28, 20, 128, 120]])
    assert CocoDetection(tmp_path, "train", crowd="keep")[0].boxes.shape == (5, 4)
    masked = CocoDetection(tmp_path, "train", masks=True, without_mask="drop")
    assert masked.dropped.no_mask == 1
    assert masked[0].masks.shape == (3, HEIGHT, WIDTH)


def test_areas_are_those_of_the_file(tmp_path, caplog):
    without = annotation(2, 10, box=(0, 0, 4, 5))
    del without["area"], without["iscrowd"], without["segmentation"], without["id"]
    write_set(tmp_path, content(annotations=[annotation(1, 10, area=1024.1), without | {"id": 2}]))
    with caplog.at_level(logging.WARNING):
        source = CocoDetection(tmp_path, "train")
    assert "1 annotations have no area; that of the box is taken" in caplog.text
    assert source.annotations(0).area.tolist() == [1024.1, 20.0]
    assert source.annotations(0).segmentations[1] is None


def test_annotations_without_ids_are_numbered_from_1(tmp_path):
    rows = [{k: v for k, v in annotation(0, image).items() if k != "id"} for image in (30, 10)]
    index = open_index(write_set(tmp_path, content(annotations=rows)))
    assert index.annotation_ids.tolist() == [2, 1]


def test_segmentations_stay_as_they_are(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[3:9, 5:20] = 1
    text = encode_mask(mask).counts.decode()
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    counts = np.diff(edges, prepend=0, append=flat.size).tolist()
    values = [
        [SQUARE[0], [20, 4, 28, 4, 28.5, 12]],
        {"size": [HEIGHT, WIDTH], "counts": text},
        {"size": [HEIGHT, WIDTH], "counts": counts},
        [[1, 1, 5, 5], [1, 2, 3, 4, 5, 6, 7], SQUARE[0]],  # two parts are no polygons
        [[1, 1, 5, 5]],
        SQUARE[0],
    ]
    rows = [annotation(number, 20, segmentation=value) for number, value in enumerate(values, 1)]
    file = write_set(tmp_path, content(annotations=[annotation(9, 30), *rows, annotation(8, 10)]))
    source = CocoDetection(file, masks=True)
    two, compressed, uncompressed, rest, none, bare = source.annotations(1).segmentations
    assert isinstance(two, Polygons)
    assert [part.tolist() for part in two.parts] == values[0]
    assert compressed == CompressedRLE((HEIGHT, WIDTH), text.encode())
    assert isinstance(uncompressed, UncompressedRLE)
    assert uncompressed.counts.tolist() == counts
    assert none == Polygons(())
    for square in (rest, bare):
        assert [part.tolist() for part in square.parts] == SQUARE
    assert source.index.notes["polygons"] == 3
    example = source[1]
    assert example.masks.shape == (5, HEIGHT, WIDTH)
    assert (example.masks.dtype, example.masks.flags.c_contiguous) == (np.uint8, True)
    np.testing.assert_array_equal(example.masks[1], mask)
    np.testing.assert_array_equal(example.masks[2], mask)
    assert example.masks[3].sum() == 64
    assert source[0].masks.sum() == source[2].masks.sum() == 64
    np.testing.assert_array_equal(example.masks, CocoDetection(file, masks=True)[1].masks)  # from the stored index


def test_file_names_with_folders_and_lvis_urls(tmp_path):
    rows = [image_row(1, "deep/er/é.png"), image_row(2, "train/2.png")]
    write_set(tmp_path, content(rows, []))
    source = CocoDetection(tmp_path, "train")
    assert source.describe(0) == str(tmp_path / "train" / "deep" / "er" / "é.png")
    assert source[0].image.shape == (HEIGHT, WIDTH, 3)
    lvis = image_row(2) | {"coco_url": "http://images.cocodataset.org/train/2.png"}
    del lvis["file_name"]
    file = write_json(tmp_path / "annotations" / "lvis_v1_train.json", content([lvis], []))
    assert CocoDetection(file).describe(0) == str(tmp_path / "train" / "train" / "2.png")


def test_lvis_federated_lists(tmp_path):
    images = [
        image_row(10) | {"neg_category_ids": [7, 1], "not_exhaustive_category_ids": []},
        image_row(20) | {"neg_category_ids": [3], "not_exhaustive_category_ids": [7]},
        image_row(30),
    ]
    categories = [{"id": n, "name": str(n), "frequency": f} for n, f in ((1, "r"), (3, "f"), (7, "c"))]
    source = CocoDetection(write_set(tmp_path, content(images, categories=categories)))
    lists = [[each.tolist() for each in source.federated(i)] for i in range(3)]
    assert lists == [[[2, 0], []], [[1], [2]], [[], []]]
    assert source.index.frequencies == ("r", "f", "c")
    assert source.index.stored is not None


def test_grey_images(tmp_path):
    file = write_set(tmp_path)
    assert CocoDetection(file, in_channels=1)[0].image.shape == (HEIGHT, WIDTH, 1)


def test_categories_of_a_trained_model_fix_the_labels(tmp_path):
    file = write_set(tmp_path, content(categories=[{"id": 7, "name": "c"}, {"id": 3, "name": "b"}]))
    assert CocoDetection(file)[0].labels.tolist() == [1]
    wanted = Categories((1, 3, 7), ("a", "b", "c"))
    source = CocoDetection(file, categories=wanted)
    assert (source[0].labels.tolist(), source.class_names, source.category_ids) == ([2], wanted.names, wanted.ids)
    with pytest.raises(ValueError, match=r"train.json has category 7=c, which is 'x' there; .* are 3=b, 7=x"):
        CocoDetection(file, categories=Categories((3, 7), ("b", "x")))
    with pytest.raises(ValueError, match="has category 7=c, which does not exist there"):
        CocoDetection(file, categories=Categories((3,), ("b",)))


def test_unknown_options(tmp_path):
    with pytest.raises(ValueError, match="crowd='ignore'; expected 'drop' or 'keep'"):
        CocoDetection(tmp_path, crowd="ignore")
    with pytest.raises(ValueError, match="on_corrupt='drop'; expected 'raise' or 'skip'"):
        CocoDetection(tmp_path, on_corrupt="drop")


# Images


def rotated(file, height, width):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise((height, width, 3))).save(file, exif=exif)


def test_exif_orientation_is_applied(tmp_path):
    file = write_set(tmp_path, content([image_row(1, "1.png")], []))
    rotated(tmp_path / "train" / "1.png", WIDTH, HEIGHT)
    example = CocoDetection(file)[0]
    assert example.image.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(example.image, np.rot90(noise((WIDTH, HEIGHT, 3)), -1))


def test_sizes_that_disagree(tmp_path):
    file = write_set(tmp_path, content([image_row(1, "1.png"), image_row(2, "2.png")], [annotation(1, 1)]))
    rotated(tmp_path / "train" / "1.png", HEIGHT, WIDTH)
    Image.fromarray(noise((10, 10, 3))).save(tmp_path / "train" / "2.png")
    source = CocoDetection(file)
    path = re.escape(str(tmp_path / "train" / "1.png"))
    with pytest.raises(CorruptImageError, match=rf"{path} is 24 x 32 \(upright\), but .*json says 32 x 24.*EXIF"):
        source[0]
    with pytest.raises(CorruptImageError, match=r"is 10 x 10 .*says 32 x 24. Was it resized after it was annotated\?"):
        source[1]
    assert CocoDetection(file, on_corrupt="skip")[0].weight == 0


def test_corrupt_images(tmp_path, caplog):
    file = write_set(tmp_path)
    bad = tmp_path / "train" / "10.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(CorruptImageError, match=rf"corrupt image {re.escape(str(bad))}: .*\(index 0\)"):
        CocoDetection(file)[0]
    source = CocoDetection(file, on_corrupt="skip", masks=True)
    with caplog.at_level(logging.WARNING):
        example = source[0]
        source[0]
    assert caplog.text.count("skipped (weight 0)") == 1
    assert (example.weight, example.image.any(), example.image.shape) == (0.0, False, (HEIGHT, WIDTH, 3))
    assert (example.boxes.shape, example.masks.shape) == ((0, 4), (0, HEIGHT, WIDTH))
    assert (source.num_skipped, source[1].weight) == (1, 1.0)


def test_missing_images_are_named(tmp_path):
    file = write_set(tmp_path, content([image_row(1), image_row(2), image_row(3, "a/3.png")], []))
    (tmp_path / "train" / "1.png").unlink()
    (tmp_path / "train" / "a" / "3.png").unlink()
    gone = re.escape(f"{tmp_path / 'train' / '1.png'}, {tmp_path / 'train' / 'a' / '3.png'}")
    with pytest.raises(FileNotFoundError, match=rf"2 of 3 images named in .*train.json do not exist: {gone}"):
        CocoDetection(file)


def test_a_wrong_mask_names_its_image(tmp_path):
    short = {"size": [HEIGHT, WIDTH], "counts": "11"}
    file = write_set(tmp_path, content(annotations=[annotation(77, 10, segmentation=short)]))
    with pytest.raises(ValueError, match="mask of 24 x 32 cannot be decoded") as caught:
        CocoDetection(file, masks=True)[0]
    assert f"annotations [77] of {tmp_path / 'train' / '10.png'} in {file}" in caught.value.__notes__
    assert CocoDetection(file)[0].boxes.shape == (1, 4)


# Where files lie


@pytest.mark.parametrize(
    ("json", "images"),
    [
        ("annotations/train.json", "train"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/train.json", "images"),
        ("annotations/train.json", "train/images"),
        ("train/_annotations.coco.json", "train"),
        ("train.json", "images/train"),
        ("train.json", "."),
    ],
)
def test_layouts(tmp_path, json, images):
    write_json(tmp_path / json, content())
    write_json(tmp_path / "annotations" / "captions_train2017.json", "{}")
    write_json(tmp_path / "annotations" / "instances_val2017.json", content())
    for number in (10, 20, 30):
        (tmp_path / images).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise((HEIGHT, WIDTH, 3))).save(tmp_path / images / f"{number}.png")
    source = CocoDetection(tmp_path, "train")
    assert source.json == tmp_path / json
    assert source.root == (tmp_path / images)
    assert source[0].image.any()


def test_what_cannot_be_found(tmp_path):
    write_set(tmp_path / "set")
    write_set(tmp_path / "set", split="val")
    with pytest.raises(FileNotFoundError, match=r"sett does not exist; .* did you mean 'set'\?"):
        CocoDetection(tmp_path / "sett")
    with pytest.raises(ValueError, match=r"several annotations: annotations/train.json, annotations/val.json; choose"):
        CocoDetection(tmp_path / "set")
    with pytest.raises(
        FileNotFoundError, match=r"no annotations of split 'test' in .*set, which has annotations/train"
    ):
        CocoDetection(tmp_path / "set", "test")
    with pytest.raises(ValueError, match="unknown split 'training'; expected one of train, val, test"):
        CocoDetection(tmp_path / "set", "training")
    with pytest.raises(ValueError, match=r"train.json is one file; split='train' is for folders"):
        CocoDetection(tmp_path / "set" / "annotations" / "train.json", "train")
    with pytest.raises(FileNotFoundError, match=r"image folder .*imgs does not exist; .*contains: annotations/"):
        CocoDetection(tmp_path / "set", "train", images=tmp_path / "set" / "imgs")
    lonely = write_json(tmp_path / "else" / "train.json", content())
    with pytest.raises(FileNotFoundError, match=r"images of .*such as '10.png', are in none of .*else.*pass images="):
        CocoDetection(lonely)
    assert len(CocoDetection(lonely, images=tmp_path / "set" / "train")) == 3


# The index


def assert_same_index(one, other):
    for a, b in zip(one[:-1], other[:-1], strict=True):
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        elif isinstance(a, tuple) and a and isinstance(a[0], np.ndarray):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)
        else:
            assert a == b


def test_the_file_is_parsed_once(tmp_path, monkeypatch):
    file = write_set(tmp_path)
    fresh = coco_json_module.parse_coco(file)
    first = open_index(file)
    assert first.stored is not None
    monkeypatch.setattr(coco_json_module, "parse_coco", lambda path: pytest.fail("parsed again"))
    again = open_index(file)
    assert_same_index(fresh, first)
    assert_same_index(fresh, again)
    assert isinstance(again.boxes_xywh.base.base, np.ndarray)
    with pytest.raises(ValueError, match="read-only"):
        again.boxes_xywh[0] = 0


def test_a_changed_file_is_parsed_again(tmp_path):
    file = write_set(tmp_path)
    source = CocoDetection(file)
    write_json(file, content(annotations=[]))
    assert CocoDetection(file)[0].boxes.shape == (0, 4)
    assert source[0].boxes.shape == (1, 4)  # it still has the file that it opened
    with pytest.raises(ValueError, match=r"the index of .*train.json, has gone or changed"):
        pickle.loads(pickle.dumps(source))


def test_a_file_just_written_is_not_cached(tmp_path):
    file = write_json(tmp_path / "train.json", content(), settled=False)
    assert open_index(file).stored is None


def test_a_damaged_index_is_made_anew(tmp_path, caplog):
    file = write_set(tmp_path)
    stored = open_index(file).stored
    whole = stored.read_bytes()
    for damaged in (whole[:300], b"", b"rubbish" * 20):
        stored.unlink()  # the old one may still be mapped
        stored.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            assert open_index(file).labels.tolist() == [2, 1]
        assert "ignored the unreadable index" in caplog.text
        assert stored.read_bytes() == whole
        caplog.clear()


def test_workers_map_the_index_themselves(tmp_path):
    rows = [annotation(n, 10, segmentation=[np.arange(400).tolist()]) for n in range(1, 50)]
    file = write_set(tmp_path, content(annotations=rows))
    source = CocoDetection(file, masks=True)
    sent = pickle.dumps(source)
    assert len(sent) < 10_000 < 49 * 400 * 8
    for a, b in zip(pickle.loads(sent)[0], source[0], strict=True):
        np.testing.assert_array_equal(a, b)
    unsettled = CocoDetection(write_json(file, content(), settled=False))
    assert isinstance(pickle.loads(pickle.dumps(unsettled))[0], DetectionExample)


# Wrong files


def broken(change):
    what = copy.deepcopy(content())
    change(what)
    return what


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ('{"images": [\n  1,,\n', r"wrong.json:2: not JSON: .* \(column"),
        ("[]", "wrong.json holds a list; expected an object with .*; a list is what files of detections are"),
        ("3", "holds a int; expected an object"),
        ('{"a": 1}', r"no 'images', only \['a'\]; expected lists"),
        (broken(lambda c: c.update(images=3)), "'images' is a int"),
        (broken(lambda c: c.update(images=[])), "'images' is empty"),
        (broken(lambda c: c.update(images=[3])), r"images\[0\] is 3; expected an object"),
        (broken(lambda c: c["annotations"][0].update(segments_info=[])), "panoptic annotations"),
        (broken(lambda c: c["images"][1].update(id=30)), r"id 30 comes twice, in images\[0\] and images\[1\]"),
        (broken(lambda c: c["images"][1].update(id="x")), r'images\[1\] has id "x"; expected a whole number'),
        (broken(lambda c: c["images"][1].pop("id")), r"images\[1\] has no 'id'"),
        (broken(lambda c: c["images"][0].pop("width")), r"images\[0\] \(id 30\) has no 'width'; expected a whole"),
        (broken(lambda c: c["images"][0].update(height=0)), r"\(id 30\) has height 0; expected the size in pixels"),
        (broken(lambda c: c["images"][0].pop("file_name")), "image with id 30 has file_name null; expected a path"),
        (
            broken(lambda c: c["images"][0].update(neg_category_ids=[2])),
            r"has neg_category_ids \[2\]; expected a list of",
        ),
        (broken(lambda c: c["categories"][0].update(id=1)), "id 1 comes twice, in categories"),
        (broken(lambda c: c["categories"][0].pop("name")), r"categories\[0\] \(id 7\) has no 'name'; expected a text"),
        (
            broken(lambda c: c["annotations"][1].update(image_id=11)),
            r"annotations\[1\] \(id 6\) has image_id 11; expected an id of 'images': 10, 20, 30 \(1 such annotations\)",
        ),
        (
            broken(lambda c: c["annotations"][1].update(category_id=2)),
            r"category_id 2; expected an id of 'categories': 1, 3",
        ),
        (
            broken(lambda c: c["annotations"][0].pop("bbox")),
            r"annotations\[0\] \(id 5\) has no 'bbox'; expected four finite numbers: x, y",
        ),
        (broken(lambda c: c["annotations"][0].update(bbox=[1, 2, 3])), r"has bbox \[1, 2, 3\]; expected four finite"),
        (broken(lambda c: c["annotations"][0].update(bbox=[1, 2, 3, "4"])), r"expected four finite numbers"),
        (broken(lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")])), r"NaN\]; expected four finite"),
        (broken(lambda c: c["annotations"][0].update(area="x")), 'has area "x"; expected a number'),
        (broken(lambda c: c["annotations"][0].update(segmentation="x")), 'has segmentation "x"; expected'),
        (broken(lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, "6"]])), "has segmentation"),
        (
            broken(lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, float("inf")]])),
            "finite numbers in",
        ),
        (broken(lambda c: c["annotations"][0].update(segmentation={"size": [4, 4]})), "has segmentation"),
        (
            broken(lambda c: c["annotations"][0].update(segmentation={"size": [24, 32], "counts": [5, 5]})),
            "has segmentation .* expected",
        ),
        (
            broken(lambda c: c["annotations"][0].update(segmentation={"size": [4, 4], "counts": "0"})),
            r"the mask of annotation 5 has height and width \[4, 4\], its image 30 has \[24, 32\]; 1 such masks",
        ),
    ],
)
def test_wrong_files(tmp_path, what, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_index(write_json(tmp_path / "wrong.json", what))
    assert str(tmp_path / "wrong.json") in str(caught.value)


def test_the_place_of_a_number_that_is_not_finite(tmp_path):
    rows = [annotation(n, 10) for n in range(1, 4)]
    rows[1]["segmentation"] = [SQUARE[0], [1, 2, 3, 4, 5, float("nan")]]
    with pytest.raises(ValueError, match=r"annotations\[1\] \(id 2\)"):
        open_index(write_json(tmp_path / "wrong.json", content(annotations=rows)))
