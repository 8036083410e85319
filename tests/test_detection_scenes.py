"""Scenes of real digits: the same for the same numbers, with boxes and masks exact to the pixel."""

import jax
import numpy as np
import pytest

from eqvision.data import digits
from eqvision.data.detection import DetectionSource, DigitScenes, detection_eval_stream, mask_boxes, one_canvas
from eqvision.data.detection import scenes as module


def test_scenes_are_a_function_of_seed_split_and_index():
    first, again = DigitScenes("train"), DigitScenes("train")
    for index in (7, 0, 4095):
        one, other = first[index], again[index]
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    images = [first[0].image, first[1].image, DigitScenes("test")[0].image, DigitScenes("train", seed=1)[0].image]
    assert len({image.tobytes() for image in images}) == 4


@pytest.mark.parametrize("options", [{}, {"channels": 1, "size": (80, 130), "max_digits": 3, "digit_size": (8, 20)}])
def test_boxes_and_masks_are_exact(options):
    source = DigitScenes("test", **options)
    for index in range(40):
        example = source[index]
        height, width = source.size
        assert example.image.shape == (height, width, source.channels)
        assert example.image.dtype == example.masks.dtype == np.uint8
        assert 1 <= len(example.boxes) == len(example.labels) == len(example.masks) <= source.max_digits
        np.testing.assert_array_equal(example.boxes, mask_boxes(example.masks))
        assert example.masks.sum(axis=0).max() == 1  # a pixel belongs to one digit: the one in front
        assert (example.boxes[:, 2:] > example.boxes[:, :2]).all()
        assert (example.image_id, example.index, example.original_size) == (index, index, (height, width))


def test_the_picture_differs_from_its_background_exactly_where_masks_are():
    source, rng = DigitScenes("train"), np.random.default_rng(0)
    flat = np.full((96, 96, 3), 30.0)
    for _ in range(20):
        image, masks = module._drawn(flat.copy(), source._placed(rng), rng)
        np.testing.assert_array_equal((image != 30).any(axis=-1), masks.any(axis=0))


def test_digits_hide_earlier_ones():
    ink = np.zeros((6, 6), np.float32)
    ink[1:5, 1:5] = 1
    digit = [module._Digit(ink, 1, 0, 0), module._Digit(ink, 2, 2, 2)]
    _, masks = module._drawn(np.zeros((10, 10, 1)), digit, np.random.default_rng(0))
    assert masks.sum(axis=(1, 2)).tolist() == [16 - 4, 16]
    assert mask_boxes(masks).tolist() == [[1, 1, 5, 5], [3, 3, 7, 7]]


def test_most_of_every_digit_can_be_seen_and_all_classes_come():
    source = DigitScenes("train", max_digits=6)
    counts, labels = np.zeros(7, int), np.zeros(10, int)
    for index in range(150):
        example = source[index]
        counts[len(example.labels)] += 1
        labels += np.bincount(example.labels, minlength=10)
        sides = example.boxes[:, 2:] - example.boxes[:, :2]
        assert sides.max() <= 40
        assert (example.masks.sum(axis=(1, 2)) >= 20).all()
    assert (counts[1:] > 5).all()
    assert (labels > 20).all()


def test_training_and_testing_share_no_digit():
    train, test = ({image.tobytes() for image in DigitScenes(split)._digits.images} for split in ("train", "test"))
    assert len(train) > 1000
    assert len(test) > 300
    assert not train & test
    np.testing.assert_array_equal(DigitScenes("test")._digits.images, digits("test").images)


def test_as_a_source():
    source = DigitScenes("test", length=5, masks=False)
    assert isinstance(source, DetectionSource)
    assert len(source) == 5
    assert source.class_names == tuple("0123456789")
    assert source.describe(3) == "scene 3 of digit scenes/test (seed 0)"
    assert source[-1].index == 4
    assert source[0].masks is None
    np.testing.assert_array_equal(source.sizes, [[96, 96]] * 5)
    with pytest.raises(IndexError):
        source[5]
    stream = detection_eval_stream(source, batch_size=2, buckets=one_canvas(96), max_objects=6, num_threads=2)
    batches = list(stream)
    assert np.concatenate([batch.indices for batch in batches]).tolist() == [0, 1, 2, 3, 4, -1]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(batches)} == {2}


def test_annotations_are_those_of_the_example():
    source = DigitScenes("test")
    example, found = source[4], source.annotations(4)
    np.testing.assert_array_equal(found.boxes, example.boxes)
    np.testing.assert_array_equal(found.labels, example.labels)
    np.testing.assert_array_equal(found.area, example.masks.sum(axis=(1, 2)))
    assert not found.iscrowd.any()
    ids = np.concatenate([source.annotations(index).ids for index in range(30)])
    assert ids.min() == 1  # 0 means "none" to COCO tools
    assert len(set(ids.tolist())) == len(ids)
    for code, mask in zip(found.segmentations, example.masks, strict=True):
        values = np.arange(len(code.counts)) % 2
        np.testing.assert_array_equal(np.repeat(values, code.counts).reshape(mask.shape, order="F"), mask)
    assert set(DigitScenes("test", masks=False).annotations(4).segmentations) == {None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "digit scenes have the splits 'train' and 'test', got 'val'"),
        ({"digit_size": (16, 97)}, r"digit_size=\(16, 97\); expected 4 <= smallest <= largest <= 96 \(canvas\)"),
        ({"channels": 4}, "channels=4, max_digits=6, seed=0; expected channels 1 or 3"),
        ({"max_digits": 0}, "max_digits=0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DigitScenes(**{"split": "train", **options})
