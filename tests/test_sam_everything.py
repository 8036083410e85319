"""Segment Anything's masks of everything: grids, crops, thresholds, overlap; the model is planted."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
import sam_references as source

from eqvision.data.detection.rle import encode_uncompressed
from eqvision.segmenters import sam as segment
from eqvision.segmenters.sam import predictor as predictor_module


def test_crops_and_grids():
    assert segment.crop_boxes((300, 400), 0) == [((0, 0, 400, 300), 0)]
    layers = segment.crop_boxes((300, 400), 2)
    assert [layer for _, layer in layers] == [0] + [1] * 4 + [2] * 16
    # 512 / 1500 of 300 are 102 pixels shared; (400 + 102) / 2 and (300 + 102) / 2 pixels a crop
    assert [box for box, layer in layers if layer == 1] == [
        (0, 0, 251, 201), (0, 99, 251, 300), (149, 0, 400, 201), (149, 99, 400, 300)
    ]  # fmt: skip
    np.testing.assert_allclose(segment.point_grid(2), [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])


def test_stability_by_hand():
    logits = np.array([[2.0, 0.5, -0.5, -2.0]])
    assert segment.stability_score(logits, 1.0) == pytest.approx(1 / 3)
    assert math.isnan(segment.stability_score(np.full((2, 2), -5.0)))


class Planted(segment.Predictor):
    """Gives masks that were made beforehand: at full size for images of ``side`` pixels, whatever the crop."""

    def __init__(self, planted):
        super().__init__(source.noisy_sam(), source.STATE, prompts_per_batch=2)
        self.planted, self.calls = planted, []

    def set_image(self, image):
        self._image = jnp.zeros((1, 8, 8, source.OUT)), segment.geometry(image.shape[:2], self.side)
        self.calls.append(image.shape[:2])

    def logits(self, points, labels):
        logits, iou = self.planted
        assert points.shape == (len(logits), 1, 2)
        assert labels.all()
        for first in range(0, len(logits), self.prompts_per_batch):
            rows = slice(first, first + self.prompts_per_batch)
            yield predictor_module.SmallMasks(logits[rows], iou[rows])


def rectangle(x1, y1, x2, y2, height=5.0):
    logits = np.full((64, 64), -height, np.float32)
    logits[y1:y2, x1:x2] = height
    return logits


def planted(rows):
    """Four points, of which the first masks are given: (logits, iou); all others are poor."""
    logits, iou = np.full((4, 4, 64, 64), -5.0, np.float32), np.zeros((4, 4), np.float32)
    for place, (mask, quality) in zip(itertools.product(range(4), range(1, 4)), rows, strict=False):
        logits[place], iou[place] = mask, quality
    return logits, iou


ROWS = [
    (rectangle(4, 6, 20, 30), 0.95),
    (rectangle(4, 6, 20, 31), 0.97),  # nearly the same, and better
    (rectangle(40, 40, 50, 50), 0.9),
    (rectangle(40, 40, 50, 50), 0.88),  # not above
    (rectangle(30, 0, 50, 12, height=0.5), 0.99),  # not stable
    (rectangle(0, 0, 64, 64), 0.91),
    (np.full((64, 64), -5.0, np.float32), 0.99),  # empty
]


def test_masks_of_everything():
    predictor = Planted(planted(ROWS))
    image = np.zeros((64, 64, 3), np.uint8)
    found = segment.find_masks(predictor, image, segment.MaskSearch(points_per_side=2))
    assert [round(each.iou, 2) for each in found] == [0.97, 0.91, 0.9]
    assert [each.box for each in found] == [(4, 6, 20, 31), (0, 0, 64, 64), (40, 40, 50, 50)]
    expected = encode_uncompressed(ROWS[1][0] > 0)
    assert found[0].run_lengths.size == (64, 64)
    assert found[0].run_lengths.counts.tolist() == expected.counts.tolist()
    assert [each.point for each in found] == [(16, 16), (48, 16), (16, 16)]
    assert {each.stability for each in found} == {1.0}


def test_masks_in_crops():
    """A mask at the inner edge of a crop is cut off; others come back at their place in the image."""
    rows = [(rectangle(24, 24, 40, 40, 50.0), 0.95), (rectangle(0, 20, 30, 40, 50.0), 0.96)]
    predictor = Planted(planted(rows))
    image = np.zeros((321, 321, 3), np.uint8)
    search = segment.MaskSearch(points_per_side=2, crop_layers=1)
    found = segment.find_masks(predictor, image, search)
    assert predictor.calls == [(321, 321)] + [(215, 215)] * 4
    by_crop = {crop: [each for each in found if each.crop == crop] for crop in {each.crop for each in found}}
    # at the left edge of an inner crop the second mask is dropped
    assert {crop: len(masks) for crop, masks in by_crop.items()} == {
        (0, 0, 321, 321): 2, (0, 0, 215, 215): 2, (0, 106, 215, 321): 2, (106, 0, 321, 215): 1, (106, 106, 321, 321): 1
    }  # fmt: skip
    inner = by_crop[(106, 106, 321, 321)][0]
    x1, y1, x2, y2 = inner.box
    assert np.allclose([x1, y1, x2, y2], 106 + np.array([24, 24, 40, 40]) * 215 / 64, atol=1)
    assert inner.run_lengths.size == (321, 321)
    assert inner.run_lengths.counts[1::2].sum() == (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points_per_side": 0}, "0 points per side, divided by 1 in each of 0 layers"),
        ({"crop_points_divisor": 8, "crop_layers": 2}, "must leave one or more"),
        ({"most_overlap": 1.5}, "most_overlap must be in 0..1, got 1.5"),
    ],
)
def test_refused_searches(options, message):
    with pytest.raises(ValueError, match=message):
        segment.MaskSearch(**options)
