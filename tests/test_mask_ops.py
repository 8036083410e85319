"""Masks cropped to boxes and pasted into images: against loops, closed forms, torch's resampling and pycocotools."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from roi_references import align_by_loops

from eqvision.data.detection import Polygons, UncompressedRLE, mask_in_box, masks_in_boxes
from eqvision.data.detection.rle import decode_mask, encode_mask
from eqvision.metrics import CocoMetric
from eqvision.ops import crop_mask, crop_masks, paste_mask, paste_masks, pasted_run_lengths

crop = jax.jit(crop_masks, static_argnames=("size", "aligned", "threshold", "max_samples"))
paste = jax.jit(paste_masks, static_argnames=("size", "rule", "threshold"))
RULES = ("detectron2", "torchvision")
IMAGE = (20, 26)
# Inside, across two borders, larger than the image, thin, empty, outside, and at whole numbers.
BOXES = np.array(
    [
        [3.3, 4.1, 15.8, 16.2],
        [-4.6, -3.2, 9.4, 7.7],
        [-9, -8, 40, 33],
        [2, 5.2, 24, 5.9],
        [7, 7, 7, 12],
        [-30, 2, -9, 9],
        [4, 6, 12, 18],
    ]
)


def blobs(rng, count, height, width):
    """Star-shaped masks of 0 and 1 with holes, and the polygons of their outlines."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    masks = []
    for _ in range(count):
        y, x = rng.uniform(0.3, 0.7, 2) * (height, width)
        angle = np.arctan2(rows - y, columns - x)
        radius = min(height, width) * (0.3 + 0.1 * np.sin(angle * rng.integers(2, 6) + rng.uniform(0, 6)))
        distance = np.hypot(rows - y, columns - x)
        masks.append((distance < radius) & (distance > 0.15 * radius))
    return np.array(masks, np.uint8)


class TestCrop:
    @pytest.mark.parametrize("aligned", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_equals_the_definition(self, rng, assert_close, aligned):
        """On the device and on the host; the rows read masks in another order than they lie."""
        masks = blobs(rng, 6, *IMAGE).reshape(2, 3, *IMAGE)
        owners = np.array([[2, 0, 1, 1, 0, 2, 1], [0, 0, 1, 2, 2, 1, 0]])
        boxes = np.broadcast_to(BOXES, (2, 7, 4)).astype(np.float32)
        got = crop(jnp.asarray(masks), boxes, jnp.asarray(owners), size=5, aligned=aligned, threshold=None)
        options = {"stride": 1, "bins": 5, "sampling_ratio": 0, "aligned": aligned}
        expected = np.zeros((2, 7, 5, 5))
        for image, row in np.ndindex(2, 7):
            level = masks[image, owners[image, row]].astype(float)[..., None]
            expected[image, row] = align_by_loops(level, boxes[image, row], **options)[..., 0]
            host = crop_mask(level[..., 0], boxes[image, row], 5, aligned=aligned)
            np.testing.assert_allclose(host, expected[image, row], atol=1e-6)
        assert_close(got.values, expected, 2e-6)
        assert not got.overflow.any()

    def test_threshold_validity_and_junk(self, rng):
        masks, valid = blobs(rng, 3, *IMAGE), np.array([True, True, False, True, False, True, True])
        owners = np.array([0, 1, 2, 0, 1, 2, 0])
        soft = np.array([crop_mask(masks[i], box, 5) for i, box in zip(owners, BOXES, strict=True)])
        junk = np.where(valid[:, None], BOXES, np.nan)[None], np.where(valid, owners, 99)[None]
        hard = np.asarray(crop(jnp.asarray(masks)[None], *map(jnp.asarray, junk), size=5, valid=valid[None]).values)
        np.testing.assert_array_equal(hard[0], (soft >= 0.5) & valid[:, None, None])
        assert hard[0, 0].any()
        assert not hard[0, [2, 4]].any()

    @pytest.mark.slow
    def test_the_limit_of_samples_is_told(self):
        boxes = jnp.asarray([[[0.0, 0, 26, 20], [0, 0, 4, 4]]])
        got = crop(jnp.ones((1, 1, *IMAGE), bool), boxes, jnp.zeros((1, 2), int), size=2, max_samples=4)
        assert got.overflow.tolist() == [[True, False]]
        assert got.values.min() == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("aligned", [True, False])
    def test_small_masks_in_their_frames_come_close(self, rng, aligned):
        """Targets of 28 x 28 from masks of 112 x 112 against those from whole images: IoU at least .96, mean .99."""
        height, width = 300, 380
        masks = blobs(rng, 8, height, width)
        frames = []
        for mask in masks:
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            frames.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        frames = np.array(frames, np.float32)
        small = np.array([crop_mask(mask, box, 112) >= 0.5 for mask, box in zip(masks, frames, strict=True)])
        sides = np.tile(frames[:, 2:] - frames[:, :2], 2)
        boxes = (frames + rng.uniform(-0.15, 0.15, frames.shape) * sides).astype(np.float32)
        owners = jnp.arange(8)[None]
        got = crop(jnp.asarray(small)[None], boxes[None], owners, size=28, frames=frames[None], aligned=aligned)
        exact = np.array([crop_mask(m, b, 28, aligned=aligned) for m, b in zip(masks, boxes, strict=True)]) >= 0.5
        found = np.asarray(got.values[0]) > 0
        overlap = (found & exact).sum(axis=(1, 2)) / (found | exact).sum(axis=(1, 2))
        assert overlap.min() >= 0.96
        assert overlap.mean() > 0.99

    @pytest.mark.slow
    def test_an_empty_frame_gives_nothing(self):
        frames = jnp.asarray([[[3.0, 3, 3, 9], [0, 0, 8, 8]]])
        boxes = jnp.broadcast_to(jnp.asarray([1.0, 1, 7, 7]), (1, 2, 4))
        got = crop(jnp.ones((1, 2, 8, 8), bool), boxes, jnp.asarray([[0, 1]]), size=2, frames=frames)
        assert got.values.sum(axis=(2, 3)).tolist() == [[0, 4]]


class TestPaste:
    @pytest.mark.parametrize("rule", RULES)
    def test_device_equals_host(self, rng, rule, assert_close):
        masks = rng.uniform(size=(7, 6, 6)).astype(np.float32)
        got = paste(
            jnp.asarray(masks)[None],
            jnp.asarray(BOXES)[None],
            size=IMAGE,
            rule=rule,
            threshold=None,
            valid=np.ones((1, 7), bool),
        )
        pairs = list(zip(masks, BOXES, strict=True))
        assert_close(got[0], np.array([paste_mask(*pair, IMAGE, rule=rule, threshold=None) for pair in pairs]), 2e-6)

    def test_ones_fill_an_integer_box(self):
        """28 x 28 ones: exactly the rectangle by the rule of detectron2, which goes by the centres of pixels."""
        ones = np.ones((28, 28), np.float32)
        expected = np.zeros(IMAGE, bool)
        expected[6:18, 4:12] = True
        np.testing.assert_array_equal(paste_mask(ones, np.array([4.0, 6, 12, 18]), IMAGE), expected)
        np.testing.assert_array_equal(paste_mask(ones, np.array([3.6, 5.7, 12.4, 18.3]), IMAGE), expected)

    def test_whole_numbers_of_torchvision(self):
        """28 cells in a box from 4 to 12: widened by 8/56 on both sides, cut to 3 .. 12, that is 10 pixels."""
        ones = np.ones((28, 28), np.float32)
        soft = paste_mask(ones, np.array([4.0, 4, 12, 12]), IMAGE, rule="torchvision", threshold=None)
        reached = np.flatnonzero(soft.any(axis=0))
        assert (reached[0], reached[-1]) == (3, 12)
        # Pixel 3 is read at 0.5 * 30 / 10 - 0.5 = 1, the first of the 28 cells behind the row of zeros.
        np.testing.assert_allclose(soft[8, [2, 3, 8, 12, 13]], [0, 1, 1, 1, 0], atol=1e-6)
        # Towards zero: -2.07 becomes -2, and 8.07 is 8: 11 pixels, of which the image has 9.
        soft = paste_mask(ones, np.array([-2.0 + 1e-3, 4, 8, 12]), IMAGE, rule="torchvision", threshold=None)
        assert np.flatnonzero(soft.any(axis=0))[-1] == 8

    def test_junk_rows_and_boxes_that_are_not_finite(self, rng):
        masks = jnp.asarray(rng.uniform(size=(1, 7, 6, 6)), jnp.float32)
        boxes = jnp.asarray(BOXES[None]).at[0, 1].set(jnp.nan).at[0, 2, 2].set(jnp.inf)
        valid = jnp.asarray([[True, False, True, True, True, True, True]])
        got = paste(masks.at[0, 1].set(jnp.nan), boxes, size=IMAGE, rule="detectron2", threshold=None, valid=valid)
        alone = paste_mask(np.asarray(masks[0, 0]), BOXES[0], IMAGE, threshold=None)
        np.testing.assert_allclose(got[0, 0], alone, atol=1e-6)
        assert not got[0, [1, 2, 4, 5]].any()
        assert not paste_mask(np.asarray(masks[0, 0]), np.array([np.nan, 0, 4, 4]), IMAGE).any()

    @pytest.mark.slow
    @pytest.mark.parametrize("rule", RULES)
    def test_the_threshold_on_the_device(self, rng, rule):
        masks = rng.uniform(size=(7, 6, 6)).astype(np.float32)
        got = paste(jnp.asarray(masks)[None], jnp.asarray(BOXES)[None], size=IMAGE, rule=rule)
        assert got.dtype == bool
        pairs = zip(masks, BOXES, strict=True)
        np.testing.assert_array_equal(got[0], [paste_mask(*pair, IMAGE, rule=rule) for pair in pairs])

    @pytest.mark.parametrize("rule", RULES)
    def test_run_lengths_are_those_of_the_pixels(self, rng, rule):
        masks = rng.uniform(size=(7, 6, 6)).astype(np.float32)
        masks[2] = 1  # all pixels of the image
        for pair, got in zip(
            zip(masks, BOXES, strict=True), pasted_run_lengths(masks, BOXES, IMAGE, rule=rule), strict=True
        ):
            pixels = paste_mask(*pair, IMAGE, rule=rule)
            assert pixels.any() or not (pair[1][2:] > 1).all() or (pair[1][0] == pair[1][2])
            code = UncompressedRLE(IMAGE, np.array(got["counts"]))
            np.testing.assert_array_equal(decode_mask(code, *IMAGE), pixels)

    def test_the_metric_takes_the_iterator(self):
        """A mask found by pasting ones is the truth drawn by hand: an average precision of 1."""
        truth = np.zeros(IMAGE, np.uint8)
        truth[6:18, 4:12] = 1
        metric = CocoMetric(("thing",), masks=True)
        box = np.array([[4.0, 6, 12, 18]])
        metric.add_truth(1, box, np.array([0]), masks=[truth])
        lengths = pasted_run_lengths(np.ones((1, 28, 28), np.float32), box, IMAGE)
        metric.add_detections(1, box, np.array([0.9]), np.array([0]), masks=lengths)
        assert metric.evaluate("masks").figures["AP"] == pytest.approx(1.0)

    def test_an_unknown_rule(self, unchecked):
        with pytest.raises(ValueError, match="paste_mask: rule 'detectron' does not exist; nearest: detectron2"):
            paste_mask(np.ones((2, 2)), BOXES[0], IMAGE, rule="detectron")
        with pytest.raises(ValueError, match="paste_masks: rule 'vision' does not exist; nearest: torchvision"):
            paste_masks(jnp.ones((1, 1, 2, 2)), jnp.ones((1, 1, 4)), IMAGE, rule="vision")


class TestHost:
    SQUARE = Polygons((np.array([4.0, 6, 12, 6, 12, 18, 4, 18]),))

    def test_a_polygon_is_drawn_in_its_box(self):
        """The square fills its own box, and a quarter of one that is twice as wide and high."""
        own, double = np.array([4.0, 6, 12, 18]), np.array([4.0, 6, 20, 30])
        np.testing.assert_array_equal(mask_in_box(self.SQUARE, own, 14, image_size=IMAGE), 1)
        quarter = np.zeros((14, 14))
        quarter[:7, :7] = 1
        np.testing.assert_array_equal(mask_in_box(self.SQUARE, double, 14, image_size=IMAGE), quarter)

    def test_sides_count_as_at_least_the_least(self):
        """A box 0.5 pixels wide counts as 1 wide in mmdet: its right half lies outside the square."""
        thin = np.array([11.5, 6.0, 12.0, 18.0])
        assert mask_in_box(self.SQUARE, thin, 14, image_size=IMAGE).all()
        half = mask_in_box(self.SQUARE, thin, 14, image_size=IMAGE, min_side=1.0)
        np.testing.assert_array_equal(half.any(axis=0), np.arange(14) < 7)

    def test_run_lengths_and_polygons_agree_and_none_is_empty(self):
        code = encode_mask(decode_mask(self.SQUARE, *IMAGE))
        box = np.array([1.0, 2, 19, 19.5])
        got = masks_in_boxes((self.SQUARE, code, None, Polygons(())), np.tile(box, (4, 1)), 16, image_size=IMAGE)
        assert got.dtype == np.uint8
        both = (got[0] & got[1]).sum() / (got[0] | got[1]).sum()
        assert both > 0.85  # a cell more or less at each side
        assert not got[2:].any()

    def test_the_hole_stays(self, rng):
        """Two run lengths of a ring: its middle is 0 in the crop."""
        ring = np.zeros(IMAGE, np.uint8)
        ring[4:16, 6:18] = 1
        ring[8:12, 10:14] = 0
        got = mask_in_box(encode_mask(ring), np.array([6.0, 4, 18, 16]), 12, image_size=IMAGE)
        np.testing.assert_array_equal(got, ring[4:16, 6:18])


@pytest.mark.parity
class TestTorch:
    def test_the_rule_of_detectron2_is_grid_sample(self, rng, assert_close):
        torch = pytest.importorskip("torch")
        rows, columns = np.mgrid[: IMAGE[0], : IMAGE[1]] + 0.5
        for box in np.delete(BOXES, 4, axis=0):
            mask = rng.uniform(size=(7, 7)).astype(np.float32)
            x, y = (columns - box[0]) / (box[2] - box[0]), (rows - box[1]) / (box[3] - box[1])
            grid = torch.tensor(np.stack([x, y], axis=-1)[None] * 2 - 1, dtype=torch.float32)
            expected = torch.nn.functional.grid_sample(torch.tensor(mask)[None, None], grid, align_corners=False)
            assert_close(paste_mask(mask, box, IMAGE, threshold=None), expected[0, 0].numpy(), 1e-5)

    def test_the_rule_of_torchvision_is_interpolate(self, rng, assert_close):
        torch = pytest.importorskip("torch")
        for box in np.delete(BOXES, (4, 5), axis=0):
            mask = rng.uniform(size=(7, 7)).astype(np.float32)
            centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * 9 / 7
            low, high = np.trunc(centre - half).astype(int), np.trunc(centre + half).astype(int)
            width, height = high - low + 1
            resized = torch.nn.functional.interpolate(
                torch.nn.functional.pad(torch.tensor(mask)[None, None], (1, 1, 1, 1)),
                size=(int(height), int(width)),
                mode="bilinear",
                align_corners=False,
            )[0, 0].numpy()
            canvas = np.zeros((IMAGE[0] + 80, IMAGE[1] + 80))
            canvas[40 + low[1] : 40 + low[1] + height, 40 + low[0] : 40 + low[0] + width] = resized
            expected = canvas[40:-40, 40:-40]
            assert_close(paste_mask(mask, box, IMAGE, rule="torchvision", threshold=None), expected, 1e-5)
