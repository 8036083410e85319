"""Heatmaps: radii and gaussians against loops of numpy, what padded rows and crowded cells do, order of peaks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.ops import draw_peaks, gaussian_radius, keep_peaks, read_cells, top_peaks
from eqvision.ops.heatmap import Peaks


def three_radii(height, width, overlap, divide):
    """The roots as CornerNet's and CenterNet's code writes them down; ``divide`` is what it leaves out."""
    first = 1, height + width, width * height * (1 - overlap) / (1 + overlap)
    second = 4, 2 * (height + width), (1 - overlap) * width * height
    third = 4 * overlap, -2 * overlap * (height + width), (overlap - 1) * width * height
    roots = []
    for number, (a, b, c) in enumerate((first, second, third)):
        root = math.sqrt(b**2 - 4 * a * c)
        if divide:  # the smaller of two positive roots of the first and second
            roots.append((b + root if number == 2 else b - root) / (2 * a))
        else:
            roots.append((b + root) / 2)
    return min(roots)


radius_of = jax.jit(gaussian_radius, static_argnames=("min_overlap", "rule"))


@pytest.mark.parametrize(("rule", "divide"), [("published", False), ("exact", True)])
def test_radius_is_that_of_the_formulas(rule, divide):
    sides = np.arange(1, 65)
    sizes = np.stack(np.meshgrid(sides, sides, indexing="ij"), axis=-1)
    for overlap in (0.3, 0.7):
        radius = np.asarray(radius_of(sizes.astype(np.float32), min_overlap=overlap, rule=rule))
        expected = np.vectorize(lambda h, w, o=overlap: three_radii(h, w, o, divide))(sizes[..., 0], sizes[..., 1])
        np.testing.assert_allclose(radius, expected, rtol=2e-6)
        # What is drawn is rounded down; where float64 says 3.0000000001, either number is as good.
        apart = np.abs(expected - np.round(expected)) > 1e-5
        assert apart.mean() > 0.95
        np.testing.assert_array_equal(radius[apart].astype(int), expected[apart].astype(int))


def iou(a, b):
    common = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))

    def area(box):
        return (box[2] - box[0]) * (box[3] - box[1])

    return common / (area(a) + area(b) - common)


@pytest.mark.parametrize(("height", "width"), [(10.0, 10.0), (7.0, 31.0)])
def test_exact_radius_keeps_the_overlap(height, width):
    """Whatever way both corners move by it, the overlap is 0.7 or more; and once it is exactly that."""
    r = float(radius_of(np.array([height, width], np.float32), rule="exact"))
    box, moves = (0.0, 0.0, width, height), (-r, r)
    overlaps = [iou(box, (a, b, width + c, height + d)) for a in moves for b in moves for c in moves for d in moves]
    assert min(overlaps) == pytest.approx(0.7, abs=1e-5)


def test_radius_of_empty_boxes_and_what_is_refused():
    np.testing.assert_array_equal(radius_of(np.array([[0, 0], [0, 5], [-3, 4]], np.float32)), 0)
    with pytest.raises(ValueError, match=r"min_overlap is 1.0; expected a value between 0 and 1"):
        gaussian_radius(jnp.ones(2), min_overlap=1.0)


@pytest.mark.usefixtures("unchecked")
def test_unknown_rule():
    with pytest.raises(ValueError, match="rule of the radius 'exakt' does not exist; nearest: exact"):
        gaussian_radius(jnp.ones(2), rule="exakt")


# Drawing


def draw_by_loops(cells, radii, labels, valid, map_size, num_classes):
    """Gaussians of whole numbers, one after the other, into the window that lies on the map."""
    heatmap = np.zeros((len(cells), *map_size, num_classes))
    for image, row in zip(*np.nonzero(valid), strict=True):
        (y, x), radius = cells[image, row], radii[image, row]
        for i in range(max(0, y - radius), min(map_size[0], y + radius + 1)):
            for j in range(max(0, x - radius), min(map_size[1], x + radius + 1)):
                deviation = (2 * radius + 1) / 6
                value = math.exp(-((i - y) ** 2 + (j - x) ** 2) / (2 * deviation**2))
                place = image, i, j, labels[image, row]
                heatmap[place] = max(heatmap[place], value)
    return heatmap


SIZE, CLASSES, ROWS = (9, 13), 3, 6
drawn = jax.jit(functools.partial(draw_peaks, map_size=SIZE, num_classes=CLASSES))


def objects(rng):
    cells = np.stack([rng.integers(0, side, (2, ROWS)) for side in SIZE], axis=-1)
    radii, labels = rng.integers(0, 5, (2, ROWS)), rng.integers(0, CLASSES, (2, ROWS))
    return cells, radii, labels, rng.uniform(size=(2, ROWS)) < 0.7


def test_peaks_are_those_of_loops(rng):
    given = objects(rng)
    heatmap = np.asarray(drawn(*given))
    np.testing.assert_allclose(heatmap, draw_by_loops(*given, SIZE, CLASSES), atol=1e-6)
    cells, _, labels, valid = given
    for image, row in zip(*np.nonzero(valid), strict=True):
        assert heatmap[image, cells[image, row, 0], cells[image, row, 1], labels[image, row]] == 1
    assert (heatmap == 1).sum() == len(
        {(i, *cells[i, r], labels[i, r]) for i, r in zip(*np.nonzero(valid), strict=True)}
    )


def test_rows_that_are_not_valid_draw_nothing(rng):
    cells, radii, labels, valid = objects(rng)
    expected = drawn(cells, radii, labels, valid)
    for junk in (-(2**31), -1, 2**31 - 1):
        other = (np.where(valid, each, junk).astype(np.int32) for each in (radii, labels))
        more = np.where(valid[..., None], cells, junk).astype(np.int32)
        np.testing.assert_array_equal(drawn(more, *other, valid), expected)
    labels = np.where(valid, [[-1, CLASSES] * 3], labels)  # no class
    np.testing.assert_array_equal(drawn(cells, radii, labels, valid), 0)


# Peaks


def test_only_local_maxima_stay():
    rows = [[5, 1, 1, 4, 4], [1, 1, 1, 1, 1], [1, 1, 3, 1, 1], [1, 1, 1, 1, 2]]
    heatmap = jnp.asarray(rows, jnp.float32)[None, :, :, None]
    stay = np.asarray(jax.jit(keep_peaks)(heatmap))[0, :, :, 0]
    expected = np.where(np.isin(rows, [2, 3, 4, 5]), rows, 0)  # 2 touches no other, and the two fours are equals
    expected[1:3, 0] = expected[3, 0] = 1  # and these see nothing but ones
    expected[1, 0] = 0  # but for this one, below the 5
    expected[3, 1] = 0
    np.testing.assert_array_equal(stay, expected)
    with pytest.raises(ValueError, match="window 2 has no cell in its middle"):
        keep_peaks(heatmap, window=2)


highest = jax.jit(top_peaks, static_argnums=1)


def test_order_of_peaks():
    heatmap = np.zeros((1, 2, 3, 2), np.float32)
    heatmap[0, 1, 2, 0], heatmap[0, 0, 1, 1], heatmap[0, 1, 0, 1], heatmap[0, 0, 0, 0] = 0.5, 0.9, 0.5, 0.5
    peaks = highest(heatmap, 4)
    assert isinstance(peaks, Peaks)
    np.testing.assert_allclose(peaks.scores, [[0.9, 0.5, 0.5, 0.5]])
    # Equals: class before row before column.
    np.testing.assert_array_equal(peaks.labels, [[1, 0, 0, 1]])
    np.testing.assert_array_equal(peaks.cells, [[[0, 1], [0, 0], [1, 2], [1, 0]]])
    assert jax.eval_shape(lambda: top_peaks(jnp.asarray(heatmap), 100)).scores.shape == (1, 12)


def test_peaks_are_the_largest_of_all(rng):
    heatmap = rng.uniform(size=(2, 7, 5, 4)).astype(np.float32)
    peaks = highest(heatmap, 20)
    for image in range(2):
        np.testing.assert_array_equal(peaks.scores[image], np.sort(heatmap[image].ravel())[::-1][:20])
        at = heatmap[image][peaks.cells[image, :, 0], peaks.cells[image, :, 1], peaks.labels[image]]
        np.testing.assert_array_equal(at, peaks.scores[image])


def test_cells_are_read_from_every_stack(rng):
    maps, cells = rng.uniform(size=(2, 3, 4, 5, 6)), np.array([[[0, 0], [3, 4]], [[9, -9], [1, 2]], [[2, 0], [0, 1]]])
    maps = maps.astype(np.float32)
    read, one = jax.jit(lambda maps, cells: (read_cells(maps, cells), read_cells(maps[0], cells)))(maps, cells)
    assert read.shape == (2, 3, 2, 6)
    np.testing.assert_array_equal(read[:, 1, 0], maps[:, 1, 3, 0])
    np.testing.assert_array_equal(read[:, 2, 1], maps[:, 2, 0, 1])
    np.testing.assert_array_equal(one, read[0])
