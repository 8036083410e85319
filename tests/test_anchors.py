"""Anchors against lists by hand, and the numbers that detectron2 and torchvision are known for."""

import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.names import UnknownNameError
from eqvision.ops import ANCHOR_RULES, anchor_grid, anchors_on_image, cell_anchors, pyramid_anchors, strides_of

RATIOS = (0.5, 1.0, 2.0)
FIVE_SIZES = ((32,), (64,), (128,), (256,), (512,))


class TestCell:
    def test_torchvision_rounds(self):
        expected = {
            32: [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]],
            64: [[-45, -23, 45, 23], [-32, -32, 32, 32], [-23, -45, 23, 45]],
            128: [[-91, -45, 91, 45], [-64, -64, 64, 64], [-45, -91, 45, 91]],
            15: [[-11, -5, 11, 5], [-8, -8, 8, 8], [-5, -11, 5, 11]],  # 7.5 to the even side
        }
        for size, boxes in expected.items():
            assert cell_anchors([size], RATIOS, dialect="torchvision").tolist() == boxes

    @pytest.mark.parametrize("dialect", ["detectron2", "mmdet"])
    def test_the_others_keep_the_area(self, dialect):
        boxes = cell_anchors([32], RATIOS, dialect=dialect)
        np.testing.assert_allclose(boxes[0], [-22.627417, -11.3137085, 22.627417, 11.3137085], rtol=1e-6)
        assert boxes[1].tolist() == [-16, -16, 16, 16]
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        np.testing.assert_allclose(width * height, 32**2, rtol=1e-6)
        np.testing.assert_allclose(height / width, RATIOS, rtol=1e-6)

    def test_order_of_several_sizes(self):
        """detectron2 runs over ratios fastest, torchvision and mmdet over sizes."""
        half_widths = {
            "detectron2": [32, 16, 8, 64, 32, 16],
            "torchvision": [32, 64, 16, 32, 8, 16],
            "mmdet": [32, 64, 16, 32, 8, 16],
        }
        assert set(half_widths) == set(ANCHOR_RULES)
        for dialect, expected in half_widths.items():
            assert cell_anchors([32, 64], [0.25, 1.0, 4.0], dialect=dialect)[:, 2].tolist() == expected

    def test_errors(self):
        with pytest.raises(
            UnknownNameError, match="dialect of anchors 'detectron' does not exist; nearest: detectron2"
        ):
            cell_anchors([32], RATIOS, dialect="detectron")
        with pytest.raises(ValueError, match=r"sizes \[\]: expected at least one number, all above 0"):
            cell_anchors([], RATIOS, dialect="mmdet")
        with pytest.raises(ValueError, match=r"aspect_ratios \[0\.5, -1\.0\]: expected at least one"):
            cell_anchors([32], [0.5, -1.0], dialect="mmdet")


class TestGrid:
    def test_two_rows_of_three_cells_by_hand(self):
        """Over y, then x, then the boxes of the cell."""
        cell = cell_anchors([32], RATIOS, dialect="torchvision")
        boxes = anchor_grid(cell, (2, 3), (4, 4))
        assert (boxes.shape, boxes.dtype) == ((18, 4), np.float32)
        assert boxes[:3].tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]
        assert boxes[3].tolist() == [-19, -11, 27, 11]  # one cell to the right
        assert boxes[9].tolist() == [-23, -7, 23, 15]  # one cell down
        assert boxes[17].tolist() == [-3, -19, 19, 27]  # the last one: (8, 4) from the first

    def test_what_detectron2_expects_of_its_own(self):
        cell = cell_anchors([32, 64], [0.25, 1, 4], dialect="detectron2")
        boxes = anchor_grid(cell, (1, 2), (4, 4))
        assert boxes[[0, 5, 6, 11]].tolist() == [
            [-32, -8, 32, 8],
            [-16, -64, 16, 64],
            [-28, -8, 36, 8],
            [-12, -64, 20, 64],
        ]
        centred = anchor_grid(cell, (1, 2), (4, 4), offset=0.5)
        assert centred[[0, 6]].tolist() == [[-30, -6, 34, 10], [-26, -6, 38, 10]]

    def test_strides_down_and_across_differ(self):
        cell = np.zeros((1, 4), np.float32)
        assert anchor_grid(cell, (2, 2), (61, 64)).tolist() == [[0] * 4, [64, 0] * 2, [0, 61] * 2, [64, 61] * 2]


class TestPyramid:
    grids = ((200, 336), (100, 168), (50, 84), (25, 42), (13, 21))

    def test_torchvision_takes_other_strides(self):
        assert strides_of(self.grids, (800, 1344)) == ((4, 4), (8, 8), (16, 16), (32, 32), (61, 64))

    def test_all_anchors_of_an_image(self):
        strides = strides_of(self.grids, (800, 1344))
        levels = pyramid_anchors(self.grids, strides, sizes=FIVE_SIZES, dialect="torchvision")
        assert [len(level) for level in levels] == [201_600, 50_400, 12_600, 3_150, 819]
        assert sum(map(len, levels)) == 268_569
        assert levels[4][-2].tolist() == [20 * 64 - 256, 12 * 61 - 256, 20 * 64 + 256, 12 * 61 + 256]

    def test_one_list_of_sizes_for_each_level(self):
        with pytest.raises(ValueError, match=r"2 grids, 2 strides and 5 lists of sizes; expected one of each"):
            pyramid_anchors(((4, 4), (2, 2)), ((4, 4), (8, 8)), sizes=FIVE_SIZES, dialect="mmdet")

    def test_which_belong_to_the_image(self):
        """Cells at 0 and 4 begin within 5 pixels, that at 8 does not; of the coarser level only the one at 0."""
        sizes = jnp.array([[5, 12], [12, 4], [0, 0]])
        fine, coarse = anchors_on_image(((3, 3), (2, 2)), ((4, 4), (8, 8)), 2, sizes)
        cells = fine.reshape(3, 3, 3, 2)
        assert cells[0, :, :, 1].tolist() == [[True] * 3, [True] * 3, [False] * 3]
        assert cells[1, :, :, 0].tolist() == [[True, False, False]] * 3
        assert coarse.reshape(3, 2, 2, 2)[0, :, :, 0].tolist() == [[True, True], [False, False]]
        assert not fine[2].any()
