"""Pictures of detections: where ink is and where none is, sizes, order, and what the plots show."""

import builtins

import numpy as np
import pytest
from PIL import Image

import eqvision.detection_pictures as pictures
from eqvision.detection_pictures import (
    DrawnObjects,
    Pair,
    Sample,
    class_color,
    confident,
    draw_objects,
    draw_pairs,
    draw_samples,
    plot_class_ap,
    plot_precision_recall,
)
from eqvision.metrics import CocoMetric

NAMES = ("cat", "dog", "bird")
GREY = np.full((200, 400, 3), 128, np.uint8)
NOTHING = DrawnObjects(np.zeros((0, 4), np.float32), np.zeros(0, np.int32))


def objects(boxes, labels=None, scores=None, masks=None):
    boxes = np.array(boxes, np.float32)
    labels = np.zeros(len(boxes), np.int32) if labels is None else np.array(labels)
    return DrawnObjects(boxes, labels, None if scores is None else np.array(scores), masks)


def changed(drawn, image=GREY):
    return (drawn != image).any(axis=-1)


def test_a_box_is_drawn_at_its_pixels():
    drawn = draw_objects(GREY, objects([[100, 60, 300, 150]], [1]), NAMES)
    assert drawn.shape == GREY.shape
    assert tuple(drawn[150, 200]) == tuple(drawn[100, 100]) == tuple(drawn[100, 300]) == class_color(1)
    ink = changed(drawn)
    assert not ink[65:145, 105:295].any()  # the object itself stays to be seen
    assert not ink[155:].any()
    assert not ink[:, :98].any()
    assert not ink[:40].any()
    assert ink[44:60, 100:120].any()  # the plate, above
    assert GREY.min() == 128  # the image given is left alone


def test_scores_and_longer_names_make_longer_plates():
    def width(**given):
        box = objects([[100, 60, 102, 150]], **given)
        return np.flatnonzero(changed(draw_objects(GREY, box, ("cat", "catamaran")))[40:58].any(axis=0)).max()

    assert width() < width(scores=[0.5]) < width(labels=[1], scores=[0.5])


CORNERS = [[0, 0, 30, 20], [380, 5, 399, 190], [-50, -50, 900, 900], [395, 195, 400, 200], [5, 5, 5, 5]]


@pytest.mark.parametrize("box", CORNERS)
def test_plates_stay_in_the_picture(box):
    """The text is whole: the same as above a box in the middle, moved."""

    def text(corners):
        drawn = draw_objects(GREY, objects([corners], scores=[0.87]), NAMES)
        rows, columns = np.nonzero((drawn == pictures._ink(class_color(0))).all(axis=-1))
        return rows - rows.min(), columns - columns.min()

    for actual, expected in zip(text(box), text([150, 100, 250, 150]), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_masks_are_translucent_and_only_where_they_are():
    image = np.random.default_rng(0).integers(0, 255, (200, 400, 3)).astype(np.uint8)
    mask = np.zeros((200, 400), bool)
    mask[80:140, 120:280] = True
    drawn = draw_objects(image, objects([[100, 60, 300, 150]], [2], masks=[mask]), NAMES)
    inside = drawn[90:130, 130:270].astype(float)
    expected = 0.55 * image[90:130, 130:270] + 0.45 * np.array(class_color(2))
    np.testing.assert_allclose(inside, expected, atol=1)
    np.testing.assert_array_equal(drawn[64:78, 104:296], image[64:78, 104:296])


def test_the_best_lies_on_top():
    boxes = [[100, 60, 300, 150]] * 2
    for scores, winner in (([0.9, 0.3], 0), ([0.3, 0.9], 1)):
        drawn = draw_objects(GREY, objects(boxes, [0, 1], scores), NAMES)
        assert tuple(drawn[150, 200]) == class_color(winner)


def test_small_and_grey_images():
    small = np.full((20, 30, 1), 100, np.uint8)
    drawn = draw_objects(small, objects([[5, 5, 15, 15]]), NAMES)
    assert drawn.shape == (220, 330, 3)
    assert tuple(drawn[5 * 11 + 60, 5 * 11]) == class_color(0)
    assert draw_objects(small, NOTHING, NAMES, least_side=1).shape == (20, 30, 3)
    np.testing.assert_array_equal(draw_objects(small, NOTHING, NAMES, least_side=1), np.repeat(small, 3, axis=-1))


def test_colors_differ_between_classes_and_carry_readable_text():
    colors = [class_color(label) for label in range(80)]
    assert len(set(colors)) == 80
    assert class_color(3) == colors[3]
    ten = np.array(colors[:10], float)
    gaps = np.abs(ten[:, None] - ten).sum(axis=-1) + 1000 * np.eye(10)
    assert gaps.min() > 60
    for color in colors:
        weights = np.array([0.299, 0.587, 0.114])
        assert abs(weights @ color - weights @ pictures._ink(color)) > 100


def test_only_confident_objects():
    masks = [np.zeros((2, 2), bool), np.ones((2, 2), bool)]
    kept = confident(objects([[0, 0, 1, 1], [2, 2, 3, 3]], [1, 2], [0.4, 0.5], masks))
    assert kept.labels.tolist() == [2]
    assert kept.boxes.tolist() == [[2, 2, 3, 3]]
    assert kept.masks[0].all()
    assert confident(kept, 0.6).boxes.shape == (0, 4)
    with pytest.raises(ValueError, match="the objects have no scores"):
        confident(NOTHING)


def test_found_is_left_and_true_is_right(tmp_path):
    found, true = objects([[100, 60, 300, 150]], [0], [0.5]), objects([[100, 60, 300, 150]], [1])
    path = draw_pairs([Pair(GREY, found, true, "a"), Pair(GREY, NOTHING, true)], NAMES, tmp_path / "new" / "pairs.png")
    sheet = np.asarray(Image.open(path))

    def columns(label, rows):
        return np.flatnonzero((sheet[rows] == class_color(label)).all(axis=-1).any(axis=0))

    half, middle = slice(0, sheet.shape[0] // 2), sheet.shape[1] // 2
    assert columns(0, half).max() < middle < columns(1, half).min()
    assert not columns(0, slice(sheet.shape[0] // 2, None)).size
    assert columns(1, slice(sheet.shape[0] // 2, None)).min() > middle
    assert sheet.shape[1] == 2 * 400 + 3 * 12


def test_samples_of_several_sizes_fill_rows(tmp_path):
    wide, tall = np.zeros((40, 400, 3), np.uint8), np.zeros((400, 40, 3), np.uint8)
    samples = [Sample(image, NOTHING, "a title much longer than the image " * 9) for image in (wide, tall, wide)]
    sheet = np.asarray(Image.open(draw_samples(samples, NAMES, tmp_path / "grid.png", columns=2)))
    black = (sheet == 0).all(axis=-1)
    assert black.sum() >= 2 * wide[..., 0].size + tall[..., 0].size
    assert sheet.shape[1] == 400 + 40 + 3 * 12
    assert 400 + 40 < sheet.shape[0] < 400 + 40 + 100
    with pytest.raises(ValueError, match="0 images in 4 columns"):
        draw_samples([], NAMES, tmp_path / "none.png")


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="label 3 has no name among 3 classes"):
        draw_objects(GREY, objects([[0, 0, 9, 9]], [3]), NAMES)
    with pytest.raises(ValueError, match=r"a mask is \(9, 9\) and the image \(200, 400\) \(height, width\)"):
        draw_objects(GREY, objects([[0, 0, 9, 9]], masks=[np.zeros((9, 9), bool)]), NAMES)


# Plots


@pytest.fixture
def result():
    """Class 0 is found exactly, class 1 at half overlap, class 2 is not there."""
    metric = CocoMetric(NAMES)
    boxes = np.array([[0, 0, 20, 20], [40, 40, 60, 60], [80, 80, 90, 90]], np.float32)
    metric.add_truth(1, boxes, np.array([0, 1, 1]))
    boxes[1, 3] = 52
    metric.add_detections(1, boxes[:2], np.array([0.9, 0.8]), np.array([0, 1]))
    return metric.evaluate()


@pytest.fixture
def figures(monkeypatch):
    """What was drawn, kept for a look at it."""
    kept, real = [], pictures.new_figure
    monkeypatch.setattr(pictures, "new_figure", lambda *size: kept.append(real(*size)) or kept[-1])
    return kept


def test_curves_show_the_precision_at_each_recall(result, figures, tmp_path):
    path = plot_precision_recall(result, tmp_path / "curves.png", title="step 5")
    assert Image.open(path).size[0] > 800
    left, right = figures[0].axes
    lines = {line.get_label().split(":")[0]: line.get_ydata() for line in right.lines}
    assert set(lines) == {"cat", "dog"}
    np.testing.assert_array_equal(lines["cat"], np.ones(101))
    np.testing.assert_array_equal(lines["dog"], [1.0] * 51 + [0.0] * 50)
    means = {line.get_label().split(":")[0]: line.get_ydata() for line in left.lines}
    np.testing.assert_allclose(means["overlap 0.5"], [1.0] * 51 + [0.5] * 50)
    np.testing.assert_allclose(means["overlap 0.75"], np.full(101, 0.5))


def test_bars_show_ap_of_the_classes_with_objects(result, figures, tmp_path):
    plot_class_ap(result, tmp_path / "bars.png")
    axes = figures[0].axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat (1)", "dog (2)"]
    half, whole = ([bar.get_width() for bar in bars] for bars in axes.containers)
    np.testing.assert_allclose(half, [100, 100 * 51 / 101])
    np.testing.assert_allclose(whole, [100, 0.3 * 100 * 51 / 101])  # right at 0.5, 0.55 and 0.6


def test_nothing_to_plot_and_many_classes(figures, tmp_path):
    metric = CocoMetric([f"class {k}" for k in range(60)])
    metric.add_truth(1, np.zeros((0, 4)), np.zeros(0, np.int32))
    assert plot_precision_recall(metric.evaluate(), tmp_path / "a.png").exists()
    assert plot_class_ap(metric.evaluate(), tmp_path / "b.png").exists()
    metric.add_truth(2, np.tile(np.array([0, 0, 9, 9]), (60, 1)), np.arange(60))
    plot_class_ap(metric.evaluate(), tmp_path / "c.png")
    axes = figures[-1].axes[0]
    assert len(axes.get_yticklabels()) == 40
    assert "20 in the middle left out" in axes.get_title()


def test_without_matplotlib_the_error_says_what_to_install(result, monkeypatch, tmp_path):
    real = builtins.__import__

    def hidden(name, *rest, **named):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", hidden)
    with pytest.raises(ImportError, match=r"plots need matplotlib .*pip install 'eqvision\[plots\]'"):
        plot_class_ap(result, tmp_path / "a.png")
