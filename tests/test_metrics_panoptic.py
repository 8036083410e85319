"""Panoptic quality by hand and against masks compared two by two; void, crowds, merging, PNG ids, messages."""

import math

import numpy as np
import pytest

from eqvision.metrics import PanopticQuality, Segment, compute, ids_to_rgb, rgb_to_ids

NAMES = ("cell", "dog", "sky")  # two things and a stuff class
THINGS = np.array([True, True, False])


def blocks(*rows):
    """A map in which each number fills 2 x 2 pixels."""
    return np.kron(np.array(rows, np.int32), np.ones((2, 2), np.int32))


def quality(*images):
    metric = PanopticQuality(NAMES, THINGS)
    for image in images:
        metric.update(*image)
    return metric


def test_by_hand():
    truth = blocks([1, 1, 1, 2], [3, 3, 3, 3])
    found = blocks([9, 9, 5, 5], [3, 3, 3, 3])
    real = [Segment(1, 0), Segment(2, 1), Segment(3, 2)]
    # 9 covers two blocks of the three of 1; 5 is half 1, half 2, and 2 has half of it: an overlap of 1/2 is no match
    metric = quality((found, [Segment(9, 0), Segment(5, 1), Segment(3, 2)], truth, real))
    values = metric.per_class()
    np.testing.assert_allclose(values["PQ"], [2 / 3, 0, 1])
    np.testing.assert_allclose(values["SQ"], [2 / 3, 0, 1])
    np.testing.assert_allclose(values["RQ"], [1, 0, 1])
    figures = metric.compute()
    assert list(figures) == ["PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st"]
    assert figures["PQ"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert figures["PQ_th"] == pytest.approx(1 / 3)
    assert figures["RQ_th"] == pytest.approx(1 / 2)
    assert figures["PQ_st"] == 1
    assert compute({"panoptic": metric})["panoptic/SQ_st"] == 1


def test_a_matched_segment_of_another_class_is_wrong_and_missed():
    same = blocks([1, 2])
    metric = quality((same, [Segment(1, 1), Segment(2, 0)], same, [Segment(1, 0), Segment(2, 0)]))
    np.testing.assert_allclose(metric.per_class()["PQ"], [1 / 1.5, 0, math.nan])


def test_void_is_left_out_of_the_union():
    truth, found = blocks([1, 1, 0, 0, 0]), blocks([4, 4, 4, 4, 4])
    metric = quality((found, [Segment(4, 0)], truth, [Segment(1, 0)]))
    assert metric.per_class()["PQ"][0] == 1  # 2 / (5 + 2 - 2 - 3)


def test_a_segment_mostly_on_void_is_not_wrong():
    truth = blocks([1, 0, 0], [1, 1, 1])
    excused = quality((blocks([5, 5, 5], [1, 1, 1]), [Segment(5, 0), Segment(1, 0)], truth, [Segment(1, 0)]))
    assert excused.per_class()["RQ"][0] == 1  # two of three blocks of 5 are void
    half = blocks([5, 5, 0], [1, 1, 1])
    assert quality((half, [Segment(5, 0), Segment(1, 0)], truth, [Segment(1, 0)])).per_class()["RQ"][0] == 1 / 1.5


def test_a_crowd_is_neither_missed_nor_matched():
    truth, found = blocks([1, 1, 1, 2]), blocks([7, 7, 8, 2])
    real = [Segment(1, 0, crowd=True), Segment(2, 2)]
    metric = quality((found, [Segment(7, 0), Segment(8, 1), Segment(2, 2)], truth, real))
    # 7 lies on a crowd of its class; 8 on one of another class, so it is wrong
    np.testing.assert_allclose(metric.per_class()["PQ"], [math.nan, 0, 1])


def test_every_crowd_of_the_class_and_void_count_together():
    truth = blocks([1, 2, 0, 3, 3])
    found = blocks([7, 7, 7, 7, 7])
    crowds = [Segment(1, 0, crowd=True), Segment(2, 0, crowd=True), Segment(3, 1)]
    metric = quality((found, [Segment(7, 0)], truth, crowds))
    assert math.isnan(metric.per_class()["PQ"][0])  # three of five blocks


def test_nothing_found_and_nothing_there():
    empty, truth = np.zeros((4, 4), np.int32), blocks([1, 1], [1, 1])
    assert quality((empty, [], truth, [Segment(1, 0)])).compute()["PQ"] == 0
    assert quality((truth, [Segment(1, 0)], blocks([2, 2], [2, 2]), [Segment(2, 1)])).compute()["PQ"] == 0
    assert math.isnan(quality((empty, [], empty, [])).compute()["PQ"])
    assert math.isnan(quality((empty, [], truth, [Segment(1, 0)])).compute()["PQ_st"])


def random_image(rng):
    """Squares over squares, so that segments overlap in part; the prediction is the truth with some of them moved."""
    truth, found = np.zeros((2, 40, 40), np.int32)
    for number in range(1, 9):
        y, x = rng.integers(0, 30, 2)
        truth[y : y + 12, x : x + 12] = number
        y, x = np.array([y, x]) + rng.integers(0, 4, 2)
        found[y : y + 12, x : x + 12] = number + 70
    real = [Segment(int(i), int(rng.integers(0, 3)), bool(rng.random() < 0.2)) for i in np.unique(truth) if i]
    labels = {segment.id: segment.label for segment in real}
    guess = [Segment(int(i), labels.get(int(i) - 70, 0)) for i in np.unique(found) if i]
    return found, guess, truth, real


def naive(found, guess, truth, real):
    """Overlap, matches, wrong and missed of each class, by masks."""
    overlap, counts = np.zeros(3), np.zeros((3, 3))
    free_guess, free_real = list(guess), [segment for segment in real if not segment.crowd]
    for a in guess:
        for b in real:
            x, y = found == a.id, truth == b.id
            value = (x & y).sum() / ((x & (truth != 0)) | y).sum()
            if value > 0.5 and a.label == b.label and not b.crowd:
                overlap[a.label] += value
                counts[0, a.label] += 1
                free_guess.remove(a)
                free_real.remove(b)
    for a in free_guess:
        excuse = truth == 0
        for b in real:
            excuse |= (truth == b.id) & (b.crowd and b.label == a.label)
        counts[1, a.label] += (excuse & (found == a.id)).sum() <= 0.5 * (found == a.id).sum()
    for b in free_real:
        counts[2, b.label] += 1
    return overlap / (counts[0] + counts[1] / 2 + counts[2] / 2)


def test_random_images_equal_masks_compared_two_by_two():
    rng = np.random.default_rng(0)
    some = 0
    for _ in range(20):
        image = random_image(rng)
        with np.errstate(invalid="ignore"):
            expected = naive(*image)
        np.testing.assert_allclose(quality(image).per_class()["PQ"], expected, rtol=1e-12)
        some += ((expected > 0) & (expected < 1)).any()
    assert some > 10


def test_merged_parts_equal_the_whole():
    rng = np.random.default_rng(1)
    images = [random_image(rng) for _ in range(6)]
    merged = quality(*images[:2]).merge(quality(*images[2:]))
    assert merged.compute() == pytest.approx(quality(*images).compute(), rel=1e-12)
    with pytest.raises(ValueError, match="different classes"):
        merged.merge(PanopticQuality(("a", "b", "c"), THINGS))
    with pytest.raises(ValueError, match="different classes, or differ in which of them are things"):
        merged.merge(PanopticQuality(NAMES, ~THINGS))


def test_ids_in_png_pixels():
    ids = np.array([[0, 1, 255], [256, 65536, 3 + 256 * 5 + 65536 * 7]])
    pixels = ids_to_rgb(ids)
    assert pixels[1].tolist() == [[0, 1, 0], [0, 0, 1], [3, 5, 7]]
    np.testing.assert_array_equal(rgb_to_ids(pixels), ids)
    with pytest.raises(ValueError, match="reach from -1 to 3; expected 0 to 16777215"):
        ids_to_rgb(np.array([[-1, 3]]))


def test_messages(unchecked):
    metric = PanopticQuality(NAMES, THINGS)
    two = blocks([1, 2])
    good = [Segment(1, 0), Segment(2, 0)]
    with pytest.raises(ValueError, match=r"predicted map is \(2, 4\), the true one \(2, 2\)"):
        metric.update(two, good, blocks([1]), [Segment(1, 0)])
    with pytest.raises(ValueError, match=r"the true map and its list .*only in the map \[2\], only in the list \[5\]"):
        metric.update(two, good, two, [Segment(1, 0), Segment(5, 0)])
    with pytest.raises(ValueError, match=r"ids of the predicted segments are \[1, 1\]; expected each once"):
        metric.update(two, [Segment(1, 0), Segment(1, 0)], two, good)
    with pytest.raises(ValueError, match="predicted segment 2 has label 3 among 3 classes; expected 0 to 2"):
        metric.update(two, [Segment(1, 0), Segment(2, 3)], two, good)
    with pytest.raises(ValueError, match="things has 2 entries for 3 classes"):
        PanopticQuality(NAMES, np.array([True, False]))
