"""Pictures of classes show image, classes, truth and errors where they are, and tables name their rows."""

import numpy as np
import pytest
from PIL import Image

import eqvision.detection_pictures as plots
from eqvision.detection_pictures import class_color
from eqvision.metrics import SegmentationMetric
from eqvision.segmentation_pictures import (
    SHARE,
    LabelPair,
    draw_errors,
    draw_label_pairs,
    draw_labels,
    legend,
    plot_pixel_confusion,
)
from eqvision.types import IGNORE_LABEL

NAMES = ("background", "road", "a car")
GREY = np.full((4, 6, 1), 100, np.uint8)
TRUTH = np.array([[0, 0, 1, 1, 2, 255]] * 4, np.uint8)


def test_classes_have_their_colours_void_is_dark_and_the_background_stays():
    drawn = draw_labels(GREY, TRUTH, NAMES, least_side=1)
    assert drawn.shape == (4, 6, 3)
    assert drawn[0, 0].tolist() == [100] * 3
    for column, label in ((2, 1), (4, 2)):
        expected = (1 - SHARE) * 100 + SHARE * np.array(class_color(label))
        np.testing.assert_allclose(drawn[0, column], expected, atol=0.51)
    assert drawn[0, 5].tolist() == [40] * 3
    assert draw_labels(GREY, TRUTH, NAMES, least_side=12).shape == (8, 12, 3)


def test_errors_are_red_and_void_pixels_are_none():
    found = np.array([[0, 1, 1, 1, 2, 2]] * 4, np.uint8)
    drawn = draw_errors(GREY, found, TRUTH, least_side=1)
    red = (drawn[..., 0] > drawn[..., 1]).any(axis=0)
    assert red.tolist() == [False, True, False, False, False, False]
    assert drawn[0, 5].tolist() == [40] * 3


def test_a_sheet_has_four_columns_and_a_legend_of_what_occurs(tmp_path):
    image = np.zeros((40, 60, 3), np.uint8)
    truth = np.zeros((40, 60), np.uint8)
    truth[:, 30:] = 2
    pairs = [LabelPair(image, np.zeros_like(truth), truth, "first"), LabelPair(image, truth, truth)]
    path = draw_label_pairs(pairs, NAMES, tmp_path / "sub" / "pairs.png", least_side=60)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[1] == 4 * 60 + 5 * 12
    tint = tuple(np.rint(SHARE * np.array(class_color(2))).astype(int))
    where = np.argwhere((np.abs(sheet.astype(int) - tint) <= 1).all(axis=-1))
    assert where[:, 1].min() > 12 + 60  # not in the column of images
    assert (sheet == class_color(2)).all(axis=-1).sum() > 100  # its square in the legend
    assert not (sheet == class_color(1)).all(axis=-1).any()  # which occurs nowhere


def test_a_legend_breaks_lines_where_they_are_full():
    names = tuple(f"class number {k}" for k in range(6))
    wide, narrow = legend(range(6), names, width=2000), legend([*range(6), IGNORE_LABEL], names, width=300)
    assert (wide.shape[1], narrow.shape[1]) == (2000, 300)
    assert narrow.shape[0] > 3 * wide.shape[0] / 2
    assert (narrow[:, -4:] == 255).all()  # nothing is cut off at the right


def metric_of(k):
    metric = SegmentationMetric(tuple(f"class {n}" for n in range(k)))
    metric.counts += np.diag(np.arange(k) * 10) + 1
    metric.counts[0] = 0
    return metric


@pytest.mark.parametrize("k", [3, pytest.param(70, marks=pytest.mark.slow)])
def test_the_table_of_confusion_names_rows_with_their_iou(tmp_path, monkeypatch, k):
    kept, real = [], plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda *size: kept.append(real(*size)) or kept[-1])
    path = plot_pixel_confusion(metric_of(k), tmp_path / "confusion.png")
    axes = kept[0].axes[0]
    rows = [text.get_text() for text in axes.get_yticklabels()]
    numbers = [text.get_text() for text in axes.texts]
    assert path.stat().st_size > 5000
    if k == 3:
        iou = metric_of(k).per_class()["iou"]
        assert rows == [f"class {n} ({100 * iou[n]:.1f})" for n in range(3)]
        assert numbers == ["8", "85", "8", "4", "4", "91"]
    else:
        assert (len(rows), numbers) == (60, [])
        assert "10 rarer classes not shown" in axes.get_title()


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label 2 has no name among 2 classes"):
        draw_labels(GREY, TRUTH, NAMES[:2])
    with pytest.raises(ValueError, match="there are no images to draw"):
        draw_label_pairs([], NAMES, tmp_path / "a.png")
