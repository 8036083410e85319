"""Detection transforms: sizes by each library's rule, and image, boxes and masks that stay together."""

import numpy as np
import pytest
from detection_boards import board

from eqvision.data import color_jitter
from eqvision.data.detection import (
    ROUNDINGS,
    Crop,
    DetectionTransform,
    Flip,
    Resize,
    clipped,
    detection_eval,
    detr_train,
    fit_eval,
    fixed_size_eval,
    fixed_size_train,
    large_scale_jitter,
    mask_boxes,
    move_example,
    random_crop_train,
    resize_masks,
    resized_size,
    scaled_size,
    shifted_crop_train,
    with_boxes_from_masks,
)
from eqvision.names import UnknownNameError

SIZES = [
    (480, 640),
    (640, 480),
    (427, 640),
    (500, 333),
    (333, 500),
    (1, 1),
    (100, 1000),
    (1333, 800),
    (37, 911),
    (75, 74),
]
TRANSFORMS = {
    "none": DetectionTransform(),
    "detr": detr_train(scales=(30, 41, 55), longest=90, crop_scales=(40, 50), crop=(25, 45)),
    "multi-scale": detr_train(scales=(30, 41, 55), longest=90, crop_probability=0, color_jitter=0.2),
    "large-scale jitter": large_scale_jitter((50, 64), scale=(0.4, 2.0)),
    "fixed": fixed_size_train((31, 77)),
    "crop": random_crop_train(48, crop=(20, 50), crop_probability=1),
    "shifted": shifted_crop_train((50, 64), border=20),
    "eval": detection_eval(47, 80),
    "fit": fit_eval(33),
    "fixed eval": fixed_size_eval((64, 48)),
}  # fmt: skip


def test_sizes_by_hand():
    assert resized_size((480, 640), 800, 1333) == (800, 1066)
    assert resized_size((480, 640), 800, 1333, "detectron2") == (800, 1067)
    assert resized_size((427, 640), 800, 1333) == (800, 1199)
    # 1333 * 333 / 500 = 887.8 > 800: no limit; 1333 * 100 / 1000 = 133.3: the shorter side becomes 133
    assert resized_size((500, 333), 800, 1333) == (1201, 800)
    assert resized_size((100, 1000), 800, 1333) == (133, 1330)
    assert resized_size((100, 1000), 800, 1333, "transformers") == (133, 1333)
    assert resized_size((100, 1000), 800, 1333, "detectron2") == (133, 1333)
    assert resized_size((100, 1000), 800, 1333, "torchvision") == (133, 1333)
    assert resized_size((74, 75), 74) == (74, 75)
    assert resized_size((3, 3000), 800, 1333) == (1, 1000)
    assert resized_size((3, 3000), 800, 1333, "torchvision") == (1, 1333)
    assert scaled_size((480, 640), (1024, 1024), 1.0) == (768, 1024)
    assert scaled_size((480, 640), (1024, 1024), 0.1) == (77, 102)
    assert scaled_size((1, 4000), (100, 100), 0.1) == (1, 10)


def test_sizes_that_cannot_be():
    with pytest.raises(UnknownNameError, match="rounding of sizes 'tourchvision' does not exist; nearest: torchvision"):
        resized_size((4, 4), 2, rounding="tourchvision")
    with pytest.raises(ValueError, match=r"size=\(0, 4\), shortest=2, longest=None; expected 1 or more for each"):
        resized_size((0, 4), 2)


@pytest.mark.parity
def test_sizes_as_in_transformers_and_torchvision():
    import torch
    from torchvision.models.detection.transform import GeneralizedRCNNTransform
    from transformers.image_transforms import get_size_with_aspect_ratio

    resize = GeneralizedRCNNTransform(800, 1333, [0.0], [1.0]).eval().resize
    for size in SIZES:
        for shortest, longest in ((800, 1333), (480, 500), (75, None), (37, 911)):
            expected = get_size_with_aspect_ratio(size, shortest, longest)
            assert resized_size(size, shortest, longest, "transformers") == tuple(max(1, side) for side in expected)
        if min(size) > 1:
            assert resized_size(size, 800, 1333, "torchvision") == tuple(
                resize(torch.zeros(1, *size), None)[0].shape[1:]
            )


def test_moves_by_hand():
    example = board(40, 60, [(10, 5, 30, 25)])
    flipped = move_example(example, (Flip(),))
    np.testing.assert_array_equal(flipped.boxes, [[30, 5, 50, 25]])  # width - x, not width - 1 - x
    cropped = move_example(example, (Crop(10, 20, 20, 30),))
    np.testing.assert_array_equal(cropped.boxes, [[-10, -5, 10, 15]])
    np.testing.assert_array_equal(clipped(cropped).boxes, [[0, 0, 10, 15]])
    halved = move_example(example, (Resize(20, 20),))
    np.testing.assert_allclose(halved.boxes, [[10 / 3, 2.5, 10, 12.5]], rtol=1e-6)
    for moved in (flipped, cropped):
        np.testing.assert_array_equal(moved.masks[0] * 255, moved.image[..., 0])
    assert halved.image.shape == (20, 20, 3)
    assert halved.original_size == (40, 60)


def test_masks_by_the_nearest_centre():
    masks = np.arange(6, dtype=np.uint8).reshape(1, 1, 6)
    assert resize_masks(masks, (1, 3))[0, 0].tolist() == [1, 3, 5]
    assert resize_masks(masks, (1, 4))[0, 0].tolist() == [0, 2, 3, 5]
    assert resize_masks(masks, (2, 9))[0, 1].tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5]
    assert resize_masks(masks[:0], (7, 5)).shape == (0, 7, 5)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("size", [(40, 60), (61, 37), (5, 7)])
def test_image_boxes_and_masks_stay_together(name, size):
    height, width = size
    box = (width // 4, height // 5, width - width // 3, height - height // 4)
    for number in range(12):
        moved = TRANSFORMS[name](board(height, width, [box]), np.random.default_rng(number))
        assert moved.image.shape[:2] == TRANSFORMS[name].output_size(size, np.random.default_rng(number))
        assert moved.masks.shape == (len(moved.boxes), *moved.image.shape[:2])
        assert moved.image.dtype == moved.masks.dtype == np.uint8
        if len(moved.boxes):
            assert_together(moved, max(moved.image.shape[0] / height, moved.image.shape[1] / width))
        else:
            assert moved.image.max() < 255  # at most what the interpolation leaves at the border


def assert_together(moved, scale):
    bright = moved.image[..., 0] > moved.image.max() / 2
    (x1, y1, x2, y2), (x, y, end_x, end_y) = moved.boxes[0], mask_boxes(bright[None].astype(np.uint8))[0]
    # An edge lies where the box says, to the pixel; a mask that was enlarged has steps as large as its old pixels.
    np.testing.assert_allclose((x, y, end_x, end_y), (x1, y1, x2, y2), atol=1.01)
    np.testing.assert_allclose(mask_boxes(moved.masks)[0], (x1, y1, x2, y2), atol=max(1.01, scale / 2 + 0.5))
    assert (moved.masks[0] != bright).mean() <= 0.15
    assert moved.boxes.min() >= 0
    assert x2 <= moved.image.shape[1]
    assert y2 <= moved.image.shape[0]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("masks", [True, False])
def test_images_without_objects(name, masks):
    moved = TRANSFORMS[name](board(33, 21, [], masks=masks), np.random.default_rng(0))
    assert moved.boxes.shape == (0, 4)
    assert moved.labels.shape == (0,)
    assert moved.masks is None if not masks else moved.masks.shape == (0, *moved.image.shape[:2])


def test_objects_that_are_cropped_away_go_with_their_labels_and_masks():
    example = board(40, 60, [(0, 0, 10, 10), (10, 5, 30, 25), (50, 30, 60, 40)])
    crop = DetectionTransform(lambda size, rng: (Crop(10, 10, 20, 30),))
    left = crop(example, np.random.default_rng(0))
    assert left.labels.tolist() == [1]
    assert left.boxes.tolist() == [[0, 0, 20, 15]]
    assert left.masks.shape == (1, 20, 30)
    none = DetectionTransform(lambda size, rng: (Crop(30, 0, 10, 20),))(example, np.random.default_rng(0))
    assert none.boxes.shape == (0, 4)
    assert none.masks.shape == (0, 10, 20)
    # A box that only touches the region has no area in it.
    touching = DetectionTransform(lambda size, rng: (Crop(0, 30, 40, 20),))(example, np.random.default_rng(0))
    assert touching.labels.tolist() == []


def test_boxes_from_masks():
    example = board(40, 60, [(10, 5, 30, 25), (40, 0, 50, 9)])
    example.masks[0, :10] = 0
    example.masks[1] = 0
    made = with_boxes_from_masks(example)
    assert made.labels.tolist() == [0]
    assert made.boxes.tolist() == [[10, 10, 30, 25]]
    assert made.boxes.dtype == np.float32
    jitter = large_scale_jitter(50, scale=(0.5, 2.0), boxes_from_masks=True)
    for number in range(8):
        moved = jitter(board(), np.random.default_rng(number))
        np.testing.assert_array_equal(moved.boxes, mask_boxes(moved.masks))
    with pytest.raises(ValueError, match="boxes_from_masks needs masks, and the example has none: open"):
        jitter(board(masks=False), np.random.default_rng(0))


def test_detr_train_draws_what_it_says():
    whole = detr_train(crop_probability=0)
    sizes = [whole.output_size((480, 640), np.random.default_rng(n)) for n in range(300)]
    assert {min(size) for size in sizes} == set(range(480, 801, 32))
    assert {size for size in sizes if size[0] == 800} == {(800, 1066)}
    transform = detr_train()
    plans = [transform.plan((480, 640), np.random.default_rng(n)) for n in range(400)]
    cropped = [plan for plan in plans if any(isinstance(move, Crop) for move in plan)]
    assert 140 < len(cropped) < 260
    assert 140 < sum(isinstance(plan[0], Flip) for plan in plans) < 260
    sides = [side for plan in cropped for move in plan if isinstance(move, Crop) for side in move[2:]]
    assert (min(sides), max(sides)) == (384, 600)
    short = {min(move) for plan in cropped for move in plan[:2] if isinstance(move, Resize)}
    assert short == {400, 500, 600}


def test_large_scale_jitter_draws_what_it_says():
    jitter = large_scale_jitter(100, flip=0)
    rng = np.random.default_rng(0)
    plans = [jitter.plan((50, 100), rng) for _ in range(2000)]
    widths = np.array([plan[0].width for plan in plans])
    assert widths.min() < 15
    assert widths.max() > 195
    assert abs(widths.mean() - 105) < 5
    assert all(len(plan) == 1 + (width > 100) for plan, width in zip(plans, widths, strict=True))
    assert max(plan[-1].height for plan in plans) == 100
    lefts = [plan[1].left / (plan[0].width - 100) for plan in plans if len(plan) == 2]
    assert min(lefts) < 0.1
    assert max(lefts) > 0.9


def test_shifted_crops_draw_what_they_say():
    """A square of 0.6 to 1.3 times the longer side around a point at least 128 pixels within the image."""
    plan, rng = shifted_crop_train(512, flip=0).plan, np.random.default_rng(0)
    plans = [plan((480, 640), rng) for _ in range(500)]
    assert {resize.width for resize, _ in plans} == {
        round(512 / share) for share in (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3)
    }
    assert all(max(crop.height, crop.width) <= 512 for _, crop in plans)
    whole = [(resize, crop) for resize, crop in plans if resize.width == round(512 / 0.6)]
    ends = np.array([(crop.left, crop.left + crop.width, resize.width) for resize, crop in whole])
    # The middle lies in 128 .. 511 of 640 and the region has 384: it reaches over both edges by up to 64.
    assert (ends[:, 0].min(), ends[:, 1].max()) == (0, ends[0, 2])
    assert ends[:, 0].max() > 0.95 * (512 - 192) / 640 * ends[0, 2]
    assert min(crop.width for _, crop in whole) < 1.05 * (128 + 192) / 640 * ends[0, 2]
    assert shifted_crop_train(64, flip=0, border=128).output_size((1, 9), rng)[0] >= 1


def test_color_jitter_comes_last_and_leaves_boxes():
    plain, jittered = (fixed_size_train(32, flip=0, color_jitter=strength) for strength in (0.0, 0.5))
    example = board()._replace(image=np.random.default_rng(5).integers(0, 256, (40, 60, 3), np.uint8))
    moved, changed = plain(example, np.random.default_rng(3)), jittered(example, np.random.default_rng(3))
    np.testing.assert_array_equal(moved.boxes, changed.boxes)
    rng = np.random.default_rng(3)
    plain.output_size((40, 60), rng)
    np.testing.assert_array_equal(changed.image, color_jitter(moved.image, rng, 0.5))
    assert (changed.image != moved.image).any()


def test_the_example_that_is_passed_stays_as_it_is():
    example = board()
    kept = [np.copy(array) for array in example[:4]]
    for transform in TRANSFORMS.values():
        transform(example, np.random.default_rng(1))
    for before, after in zip(kept, example[:4], strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: detr_train(scales=()), r"scales=\(\); expected lengths in pixels, 1 or more"),
        (lambda: detr_train(crop=(0, 5)), r"crop=\(0, 5\); expected lengths in pixels"),
        (lambda: detr_train(flip=1.5), "flip=1.5; expected a probability, 0 to 1"),
        (lambda: detr_train(crop_probability=-1), "crop_probability=-1; expected a probability"),
        (lambda: detr_train(rounding="dert"), "rounding of sizes 'dert' does not exist; nearest: detr"),
        (lambda: large_scale_jitter(64, scale=(0.0, 2.0)), r"scale=\(0.0, 2.0\); expected 0 < lowest <= highest"),
        (lambda: shifted_crop_train(64, scales=(0.0,)), r"scales=\(0.0,\), border=128; expected shares above 0"),
        (lambda: fixed_size_eval(0), r"size=\(0, 0\); expected lengths"),
        (
            lambda: DetectionTransform(interpolation="bilinaer"),
            "interpolation 'bilinaer' does not exist; nearest: bil",
        ),
        (lambda: DetectionTransform(color_jitter=2), "color_jitter=2; expected 0"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_rounding_keeps_the_shape():
    for rounding in ROUNDINGS:
        height, width = resized_size((427, 640), 600, 1000, rounding)
        assert abs(width / height - 640 / 427) < 0.005
