"""Masks from file to batch: squares of what lies in each box, truth as run lengths, and images that are special."""

import logging
import re

import jax.numpy as jnp
import numpy as np
import pytest
from coco_files import HEIGHT, SQUARE, WIDTH, annotation, content, image_row, write_set
from detection_boards import Boards
from images import take

from eqvision.data.detection import (
    CocoDetection,
    Crop,
    DetectionTransform,
    DigitScenes,
    Flip,
    Polygons,
    Resize,
    crops_in_boxes,
    decode_mask,
    detection_eval_stream,
    detection_train_stream,
    detr_train,
    encode_mask,
    fixed_size_train,
    large_scale_jitter,
    mask_boxes,
    move_masks,
    one_canvas,
)
from eqvision.metrics import CocoMetric
from eqvision.ops import crop_masks

TRANSFORMS = {
    "none": DetectionTransform(),
    "fixed": fixed_size_train((56, 40)),
    "lsj": large_scale_jitter(56, scale=(0.3, 2.0)),
    "detr": detr_train(scales=(30, 40), longest=56, crop_scales=(40, 50), crop=(20, 40)),
}


def train(source, count=2, **options):
    options = {"batch_size": 3, "seed": 1, "buckets": one_canvas(56), "num_threads": 0, "max_objects": 6} | options
    return take(detection_train_stream(source, masks=True, **options), count)


def evaluate(source, **options):
    options = {"batch_size": 2, "buckets": one_canvas(HEIGHT, WIDTH), "num_threads": 0, "max_objects": 4} | options
    return take(detection_eval_stream(source, masks=True, **options), 100)


def scenes():
    return DigitScenes("train", size=48, channels=1, digit_size=(12, 24), length=12)


def ring(inner=4):
    """A square with a hole in its middle."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[4:20, 8:24] = 1
    middle = (slice(12 - inner, 12 + inner), slice(16 - inner, 16 + inner))
    mask[middle] = 0
    return mask


def run_lengths(mask):
    return {"size": list(mask.shape), "counts": encode_mask(mask).counts.decode()}


# Squares in boxes


@pytest.mark.parametrize("name", TRANSFORMS)
def test_crops_are_what_full_masks_have_in_the_boxes(name):
    options = {"transform": TRANSFORMS[name]}
    for whole, cropped in zip(train(scenes(), **options), train(scenes(), mask_crop=9, **options), strict=True):
        targets, full = cropped.targets, whole.targets
        assert (targets.masks.shape, targets.masks.dtype) == ((3, 6, 9, 9), np.uint8)
        assert (targets.frames.shape, targets.frames.dtype) == ((3, 6, 4), np.float32)
        assert full.frames is None
        np.testing.assert_array_equal(targets.boxes, full.boxes)
        np.testing.assert_array_equal(targets.frames, targets.boxes)
        for row in range(3):
            valid = targets.valid[row]
            expected = crops_in_boxes(full.masks[row][valid], full.boxes[row][valid], 9)
            np.testing.assert_array_equal(targets.masks[row][valid], expected)
            assert 0.2 < targets.masks[row][valid].mean() < 1
            assert not targets.masks[row][~valid].any()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_masks_and_boxes_stay_together_through_transforms(name):
    """What is left of an object that was cut lies in its box, and what was not cut fills it."""
    whole = 0
    for batch in train(scenes(), count=4, transform=TRANSFORMS[name]):
        for row, (height, width) in enumerate(batch.size):
            valid = batch.targets.valid[row]
            boxes, masks = batch.targets.boxes[row][valid], batch.targets.masks[row][valid]
            seen = masks.any(axis=(1, 2))  # of a sliver at the edge the nearest centre may show nothing
            assert seen.mean() > 0.7
            boxes, tight = boxes[seen], mask_boxes(masks[seen])
            assert (tight[:, :2] >= boxes[:, :2] - 2).all()
            assert (tight[:, 2:] <= boxes[:, 2:] + 2).all()
            uncut = (boxes[:, :2] > 0).all(axis=1) & (boxes[:, 2:] < (width, height)).all(axis=1)
            np.testing.assert_allclose(tight[uncut], boxes[uncut], atol=2)
            whole += uncut.sum()
    assert whole > 10


def test_moves_at_once_are_moves_in_turn(rng):
    masks = (rng.random((3, 11, 14)) < 0.5).astype(np.uint8)
    moves = (Resize(23, 9), Flip(), Crop(3, 2, 15, 6), Resize(8, 31), Flip(), Crop(1, 0, 5, 31))
    in_turn = masks
    for move in moves:
        in_turn = in_turn[..., ::-1] if isinstance(move, Flip) else move_masks(in_turn, (move,))
    np.testing.assert_array_equal(move_masks(masks, moves), in_turn)
    assert move_masks(masks, ()) is masks
    np.testing.assert_array_equal(move_masks(masks, moves[2:3]), masks[:, 3:18, 2:8])


def test_a_hole_is_seen_in_the_square():
    (crop,) = crops_in_boxes(ring()[None], np.array([[8.0, 4, 24, 20]]), 8)
    expected = np.ones((8, 8), np.uint8)
    expected[2:6, 2:6] = 0
    np.testing.assert_array_equal(crop, expected)


def test_boxes_without_area_and_outside_give_zeros():
    boxes = np.array([[5, 5, 5, 9], [0, 0, 0, 0], [-20, -20, -3, -3], [40, 40, 60, 60], [np.nan, 0, 4, 4]])
    assert not crops_in_boxes(np.ones((5, 24, 32), np.uint8), boxes, 7).any()


def test_rows_that_hold_nothing_are_harmless_on_the_device():
    """Padding has frames of zeros; nothing of it may become NaN."""
    (batch,) = evaluate(Boards([(24, 32)] * 2), mask_crop=6)
    assert batch.targets.valid.sum() == 1
    boxes = jnp.asarray([[[4.0, 2, 7, 5], [0, 0, 0, 0]]] * 2)
    owners = jnp.asarray([[0, 3]] * 2)
    frames = jnp.asarray(batch.targets.frames)
    got = crop_masks(jnp.asarray(batch.targets.masks), boxes, owners, size=4, frames=frames, threshold=None)
    assert np.isfinite(got.values).all()
    assert not got.values[0].any()
    assert not got.overflow.any()


def test_squares_need_a_side_and_masks():
    message = "mask_crop=0; expected the side of the squares that hold masks, 1 or more, or None for masks at the size"
    with pytest.raises(ValueError, match=message):
        evaluate(Boards([(24, 32)]), mask_crop=0)
    with pytest.raises(ValueError, match=message):
        train(Boards([(24, 32)]), mask_crop=0)
    stream = detection_eval_stream(Boards([(24, 32)]), batch_size=1, buckets=one_canvas(32), mask_crop=5, num_threads=0)
    targets = next(stream).targets
    assert targets.masks is None
    assert targets.frames is None


# Special images


def test_of_too_many_objects_the_largest_keep_their_masks(caplog):
    stream = detection_eval_stream(
        Boards([(24, 32)] * 4), batch_size=4, buckets=one_canvas(24, 32), max_objects=2, masks=True, mask_crop=5,
        num_threads=0,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        (batch,) = stream
    assert stream.num_dropped == 1
    assert "board 3 has 3 objects; only the max_objects=2 largest are kept" in caplog.text
    assert batch.targets.labels[3].tolist() == [1, 2]
    np.testing.assert_array_equal(batch.targets.frames[3], [[4, 2, 7, 8], [8, 2, 11, 11]])
    assert batch.targets.masks[3].all()  # boards fill their boxes


def test_images_without_objects_have_no_targets(tmp_path):
    write_set(tmp_path, content(annotations=[annotation(1, 10)]))
    source = CocoDetection(tmp_path, "train", masks=True)
    batches = evaluate(source, mask_crop=4) + evaluate(source)
    for batch in batches:
        assert [valid.sum() for valid in batch.targets.valid] == [1 if index == 0 else 0 for index in batch.indices]
        assert not batch.targets.masks[~batch.targets.valid].any()
    assert list(source.truth_masks(1)) == []


def crowd_set(tmp_path):
    """Image 10 has one object, image 20 a crowd alone (with holes, and one that is only a box)."""
    region = annotation(2, 20, box=(8, 4, 16, 16), iscrowd=1, segmentation=run_lengths(ring()))
    bare = annotation(3, 20, box=(0, 0, 4, 5), iscrowd=1, segmentation=[])
    rows = [annotation(1, 10), region, bare]
    write_set(tmp_path, content([image_row(10), image_row(20)], rows, [{"id": 1, "name": "a"}]))
    return CocoDetection(tmp_path, "train", masks=True)


def test_an_image_of_crowds_is_trained_on_as_one_without_objects(tmp_path):
    source = crowd_set(tmp_path)
    assert source.dropped.crowd == 2
    (batch,) = evaluate(source, mask_crop=4)
    assert batch.targets.valid.sum(axis=1).tolist() == [1, 0]
    assert batch.weights.tolist() == [1, 1]
    assert batch.images[1].any()


def test_detections_on_crowds_are_neither_right_nor_wrong(tmp_path):
    source = crowd_set(tmp_path)

    def figures(mask, box):
        metric = CocoMetric(source.class_names, masks=True)
        for index in range(2):
            truth = source.truth(index)
            metric.add_truth(
                index, truth.boxes, truth.labels, area=truth.area, crowd=truth.iscrowd, masks=source.truth_masks(index)
            )
        right = decode_mask(Polygons((np.array(SQUARE[0], float),)), HEIGHT, WIDTH)
        metric.add_detections(0, np.array([[4.0, 4, 12, 12]]), np.array([0.5]), np.array([0]), masks=[right])
        metric.add_detections(1, np.array([box]), np.array([0.9]), np.array([0]), masks=[mask])
        return metric.compute()

    on_region = np.zeros((HEIGHT, WIDTH), np.uint8)
    on_region[5:8, 9:20] = 1
    on_bare, beside = np.zeros_like(on_region), np.zeros_like(on_region)
    on_bare[1:4, 1:3] = 1
    beside[20:24, 26:32] = 1
    for mask, box in ((on_region, [9.0, 5, 20, 8]), (on_bare, [1.0, 1, 3, 4])):
        found = figures(mask, box)
        assert found["AP"] == found["mask_AP"] == pytest.approx(1.0)
    found = figures(beside, [26.0, 20, 32, 24])
    assert found["AP50"] == found["mask_AP50"] == pytest.approx(0.5)
    in_hole = figures(np.pad(np.ones((6, 6), np.uint8), ((9, 9), (13, 13))), [13.0, 9, 19, 15])
    assert in_hole["AP50"] == pytest.approx(1.0)  # in the box of the crowd
    assert in_hole["mask_AP50"] == pytest.approx(0.5)  # and not of its mask


def test_boxes_outside_the_image_go_with_their_masks(tmp_path):
    corner, inside = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    corner[:6, :5], inside[10:14, 20:28] = 1, 1
    rows = [
        annotation(1, 10, box=(WIDTH + 1, 2, 5, 5)),  # beside the image
        annotation(2, 10, 3, box=(-3, -2, 8, 8), segmentation=run_lengths(corner)),
        annotation(3, 10, box=(-9, 3, 5, 5)),
        annotation(4, 10, 7, box=(20, 10, 8, 4), segmentation=run_lengths(inside)),
    ]
    write_set(tmp_path, content([image_row(10)], rows))
    source = CocoDetection(tmp_path, "train", masks=True)
    assert source.dropped.outside == 2
    example = source[0]
    np.testing.assert_array_equal(example.boxes, [[0, 0, 5, 6], [20, 10, 28, 14]])
    np.testing.assert_array_equal(example.masks, [corner, inside])
    (batch,) = evaluate(source, mask_crop=4, batch_size=1)
    assert batch.targets.labels[0, :2].tolist() == [1, 2]
    assert batch.targets.masks[0, :2].all()
    np.testing.assert_array_equal(source.truth(0).boxes[1], [-3, -2, 5, 6])  # evaluation takes the file's word


# Kinds of masks


def test_masks_of_every_kind_are_truth_in_pixels_of_the_file(tmp_path):
    hole = ring()
    flat = hole.ravel(order="F")
    counts = np.diff(np.flatnonzero(np.diff(flat, prepend=0)), prepend=0, append=flat.size).tolist()
    two_parts = [SQUARE[0], [20, 4, 28, 4, 28, 12, 20, 12]]
    values = [run_lengths(hole), {"size": [HEIGHT, WIDTH], "counts": counts}, two_parts]
    rows = [annotation(number, 10, segmentation=value) for number, value in enumerate(values, 1)]
    write_set(tmp_path, content([image_row(10)], rows))
    source = CocoDetection(tmp_path, "train", masks=True)
    parts = np.zeros((HEIGHT, WIDTH), np.uint8)
    parts[4:12, 4:12], parts[4:12, 20:28] = 1, 1
    np.testing.assert_array_equal(source[0].masks, [hole, hole, parts])
    codes = list(CocoDetection(tmp_path, "train").truth_masks(0))  # also where examples have no masks
    assert [code["counts"] for code in codes] == [encode_mask(mask).counts for mask in (hole, hole, parts)]
    assert all(code["size"] == [HEIGHT, WIDTH] for code in codes)


def test_the_truth_of_scenes_is_what_is_drawn():
    source = DigitScenes("test", size=48, masks=False)
    expected = DigitScenes("test", size=48)[3].masks
    metric = CocoMetric(source.class_names, masks=True)
    truth = source.truth(3)
    metric.add_truth(3, truth.boxes, truth.labels, masks=source.truth_masks(3))
    codes = list(source.truth_masks(3))
    assert len(codes) == len(expected) == len(truth.labels)
    for code, mask in zip(codes, expected, strict=True):
        runs = np.repeat(np.arange(len(code["counts"])) % 2, code["counts"])
        np.testing.assert_array_equal(runs.reshape(48, 48).T, mask)
    metric.add_detections(3, truth.boxes, np.ones(len(codes)), truth.labels, masks=list(expected))
    assert metric.compute()["mask_AP"] == pytest.approx(1.0)


def test_polygons_without_three_corners_are_no_targets_and_cannot_be_found(tmp_path, caplog):
    rows = [annotation(1, 10, segmentation=[[1, 1, 5, 5]]), annotation(2, 10, 3)]
    file = write_set(tmp_path, content([image_row(10)], rows))
    with caplog.at_level(logging.WARNING):
        source = CocoDetection(tmp_path, "train", masks=True)
    assert f"{file}: 1 polygons are left out, which have less than three corners" in caplog.text
    assert f"{file}: 1 objects have no mask and are left out" in caplog.text
    assert source.dropped.no_mask == 1
    assert source[0].labels.tolist() == [1]
    empty, square = source.truth_masks(0)
    assert empty["counts"] == encode_mask(np.zeros((HEIGHT, WIDTH), bool)).counts
    assert square["counts"] != empty["counts"]
    assert CocoDetection(tmp_path, "train")[0].labels.tolist() == [0, 1]  # boxes are there all the same


def test_objects_without_masks_are_refused_where_masks_are_asked_for(tmp_path):
    rows = [annotation(1, 10), annotation(22, 10, segmentation=[]), annotation(23, 20, segmentation=None)]
    file = write_set(tmp_path, content(annotations=rows))
    boxes = CocoDetection(tmp_path, "train")
    start = re.escape(str(file))
    message = (
        rf"{start}: 2 of 3 objects have no segmentation, and masks were asked for; the first is annotation 22 of image "
        r"10\.png\. Give them outlines or run lengths, remove them, or .* without_mask='drop' leaves them out"
    )
    with pytest.raises(ValueError, match=message):
        CocoDetection(tmp_path, "train", masks=True)
    with pytest.raises(ValueError, match=rf"{start}: annotation 22 of image 10\.png has no segmentation, and masks"):
        list(boxes.truth_masks(0))
    kept = CocoDetection(tmp_path, "train", masks=True, without_mask="drop")
    assert (kept.dropped.no_mask, kept[0].masks.shape) == (2, (1, HEIGHT, WIDTH))
    with pytest.raises(ValueError, match="without_mask='ignore'; expected 'raise' or 'drop'"):
        CocoDetection(tmp_path, "train", without_mask="ignore")
