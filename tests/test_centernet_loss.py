"""CenterNet's loss: against plain numpy, with junk in unused rows, padding and order of objects, and on two devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_centernet_ops import draw_by_loops, three_radii

from eqvision.losses import CENTERNET_LOSS, CenterCounts, CenterNetConfig, center_counts, center_loss, center_targets
from eqvision.types import CenterPredictions, DetectionTargets

BATCH, ROWS, CLASSES, STACKS, MAP, STRIDE = 4, 5, 3, 2, (8, 10), 4


def draw(seed=0):
    """Random predictions and objects; the third image has none, and the first and second have boxes of all kinds."""
    rng = np.random.default_rng(seed)
    size = np.array([[32, 40], [29, 33], [32, 31], [20, 40]], np.int32)
    corners = rng.uniform(-0.1, 1.1, (BATCH, ROWS, 2, 2)) * size[:, None, None, ::-1]
    boxes = np.concatenate([corners.min(axis=2), corners.max(axis=2)], axis=-1)
    labels = rng.integers(0, CLASSES, (BATCH, ROWS))
    valid = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1], [0] * 5, [0, 1, 0, 0, 1]], bool)
    boxes[0, :2], labels[0, :2] = [[4, 4, 12, 12], [2, 3, 14, 13]], 1  # one cell, one class
    boxes[1, 1], boxes[1, 2] = [40, 0, 50, 9], [7, 7, 7, 20]  # outside the image, and without area
    targets = DetectionTargets(boxes.astype(np.float32), labels.astype(np.int32), valid)
    predictions = CenterPredictions(
        rng.normal(-1, 2, (STACKS, BATCH, *MAP, CLASSES)).astype(np.float32),
        *rng.normal(2, 2, (2, STACKS, BATCH, *MAP, 2)).astype(np.float32),
    )
    return predictions, targets, size


@jax.jit
def graded(predictions, targets, size, weights, counts=None):
    """Loss, terms, gradient, and the targets."""
    counts = center_counts(targets, size, weights) if counts is None else counts
    (loss, terms), gradient = jax.value_and_grad(center_loss, has_aux=True)(predictions, targets, size, weights, counts)
    return loss, terms, gradient


def cut(targets, size):
    """Boxes in cells by image, those of area 0 left out: label, left, top, right, bottom."""
    for image, row in zip(*np.nonzero(targets.valid), strict=True):
        box = np.clip(targets.boxes[image, row], 0, np.tile(size[image, ::-1], 2)) / STRIDE
        if (box[2:] > box[:2]).all():
            yield image, row, int(targets.labels[image, row]), box.astype(np.float64)


def plain_loss(predictions, targets, size):
    """The published code's sums, with boxes cut at the image's border and no loss in the padding."""
    cells, radii = np.zeros((BATCH, ROWS, 2), int), np.zeros((BATCH, ROWS), int)
    real, objects, used = np.zeros((BATCH, ROWS), bool), [], set()
    for image, row, label, (left, top, right, bottom) in cut(targets, size):
        x, y, width, height = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
        cells[image, row], real[image, row] = (int(y), int(x)), True
        radii[image, row] = int(three_radii(math.ceil(height), math.ceil(width), 0.7, False))
        objects.append((image, int(y), int(x), (width, height), (x - int(x), y - int(y))))
        used.add((image, int(y), int(x), label))
    heatmap = draw_by_loops(cells, radii, targets.labels, real, MAP, CLASSES)
    heat = distance = shift = 0.0
    for stack in range(STACKS):
        p = np.clip(1 / (1 + np.exp(-predictions.logits[stack].astype(np.float64))), 1e-4, 1 - 1e-4)
        values = np.where(heatmap == 1, (1 - p) ** 2 * np.log(p), (1 - heatmap) ** 4 * p**2 * np.log(1 - p))
        for image, (height, width) in enumerate(-(-size // STRIDE)):
            heat -= values[image, :height, :width].sum()
        for image, y, x, extent, offset in objects:
            distance += np.abs(predictions.sizes[stack, image, y, x] - extent).sum()
            shift += np.abs(predictions.offsets[stack, image, y, x] - offset).sum()
    pairs = STACKS * (2 * len(objects) + 1e-4)
    terms = {"heatmap": heat / STACKS / len(used), "size": distance / pairs, "offset": shift / pairs}
    return terms, CenterCounts(len(used), len(objects)), heatmap


ALL = np.ones(BATCH, np.float32)


def test_loss_is_that_of_plain_numpy():
    given = draw()
    loss, terms, gradient = graded(*given, ALL)
    expected, _, _ = plain_loss(*given)
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5)
    np.testing.assert_allclose(loss, expected["heatmap"] + 0.1 * expected["size"] + expected["offset"], rtol=1e-5)
    assert all(np.isfinite(each).all() and np.abs(each).max() > 0 for each in gradient)


def test_targets_and_counts():
    predictions, targets, size = draw()
    _, counts, heatmap = plain_loss(predictions, targets, size)
    assert (counts.centers, counts.objects) == (7, 8)
    made, mine = jax.jit(lambda *given: (center_targets(*given, MAP, CLASSES), center_counts(*given)))(
        targets, size, ALL
    )
    assert (mine.centers, mine.objects) == tuple(counts)
    np.testing.assert_allclose(made.heatmap, heatmap, atol=1e-6)
    seen = {(image, row): box for image, row, _, box in cut(targets, size)}
    made = made._replace(**{name: np.asarray(value) for name, value in made._asdict().items()})
    assert set(seen) == set(zip(*np.nonzero(made.weights), strict=True))
    for place, box in seen.items():
        centre = made.cells[place][::-1] + made.offsets[place]
        np.testing.assert_allclose(centre, (box[:2] + box[2:]) / 2, rtol=1e-5)
        np.testing.assert_allclose(made.sizes[place], box[2:] - box[:2], rtol=1e-4)
    assert (made.offsets >= 0).all()
    assert (made.offsets < 1).all()


def test_junk_changes_nothing(assert_close):
    """In rows that are not valid, in images of weight 0, and in the cells of padding."""
    predictions, targets, size = draw()
    weights = np.array([1, 1, 1, 0], np.float32)
    expected = graded(predictions, targets, size, weights)
    unused = ~targets.valid | (weights == 0)[:, None]
    dirty = DetectionTargets(
        np.where(unused[..., None], np.nan, targets.boxes).astype(np.float32),
        np.where(unused, -7, targets.labels).astype(np.int32),
        targets.valid,
    )
    rows, columns = np.arange(MAP[0]) * STRIDE, np.arange(MAP[1]) * STRIDE
    outside = (rows >= size[:, :1])[:, :, None] | (columns >= size[:, 1:])[:, None] | (weights == 0)[:, None, None]
    assert outside[:3].any()
    broken = CenterPredictions(*(np.where(outside[..., None], np.float32(np.nan), each) for each in predictions))
    actual = graded(broken, dirty, np.where(weights[:, None] == 0, -3, size).astype(np.int32), weights)
    assert_close(actual, expected, 1e-6)
    assert all(not np.asarray(each)[:, outside].any() for each in actual[2])


def test_order_of_objects_changes_nothing(assert_close, rng):
    predictions, targets, size = draw()
    order = rng.permuted(np.tile(np.arange(ROWS), (BATCH, 1)), axis=1)
    rows = np.arange(BATCH)[:, None]
    moved = DetectionTargets(*(each[rows, order] for each in targets[:3]))
    assert_close(graded(predictions, moved, size, ALL), graded(predictions, targets, size, ALL), 1e-6)


@pytest.mark.slow
def test_more_padding_changes_nothing(assert_close):
    """Larger maps with junk behind, and more rows of targets."""
    predictions, targets, size = draw()
    extra = ((0, 0), (0, 0), (0, 3), (0, 2), (0, 0))
    larger = CenterPredictions(*(np.pad(each, extra, constant_values=np.nan) for each in predictions))
    more = DetectionTargets(*(np.pad(each, [(0, 0), (0, 2)] + [(0, 0)] * (each.ndim - 2)) for each in targets[:3]))
    loss, terms, gradient = graded(larger, more, size, ALL)
    expected = graded(predictions, targets, size, ALL)
    gradient = CenterPredictions(*(each[:, :, : MAP[0], : MAP[1]] for each in gradient))
    assert_close((loss, terms, gradient), expected, 1e-6)


def test_shares_of_devices_add_up(assert_close):
    """Each device holds half of the images, and the counts are those of all."""
    predictions, targets, size = draw()
    whole = graded(predictions, targets, size, ALL)
    shares = [graded(predictions, targets, size, half, counts(targets, size)) for half in HALVES]
    assert_close(jax.tree.map(lambda a, b: a + b, *shares), whole, 1e-6)


HALVES = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], np.float32)


def counts(targets, size):
    of = jax.jit(center_counts)
    return jax.tree.map(lambda a, b: a + b, *(of(targets, size, half) for half in HALVES))


def test_no_objects():
    predictions, targets, size = draw()
    loss, terms, gradient = graded(predictions, targets._replace(valid=np.zeros_like(targets.valid)), size, ALL)
    assert (terms["size"], terms["offset"]) == (0, 0)
    np.testing.assert_allclose(loss, terms["heatmap"])
    assert 0 < loss < np.inf
    assert all(np.isfinite(each).all() for each in gradient)
    extreme = predictions._replace(logits=np.where(predictions.logits > 0, 1e4, -1e4).astype(np.float32))
    assert all(np.isfinite(each).all() for each in jax.tree.leaves(graded(extreme, targets, size, ALL)))


@pytest.mark.parametrize(
    ("field", "value"), [("labels", CLASSES), ("labels", -1), ("boxes", np.nan), ("boxes", np.inf)]
)
def test_wrong_objects_are_not_passed_over(field, value):
    predictions, targets, size = draw()
    column = getattr(targets, field).copy()
    column[3, 4] = value
    wrong = targets._replace(**{field: column})
    assert np.isnan(graded(predictions, wrong, size, ALL)[0])
    assert np.isfinite(graded(predictions, wrong, size, np.array([1, 1, 1, 0], np.float32))[0])


def test_centres_outside_the_maps_are_not_passed_over():
    predictions, targets, size = draw()
    far = targets._replace(boxes=targets.boxes + 100)
    assert np.isnan(graded(predictions, far, 4 * size, ALL)[0])  # as for a model of stride 16


def test_refused():
    predictions, targets, size = draw()
    two = DetectionTargets(*(each[:2] for each in targets[:3]))
    with pytest.raises(ValueError, match="predictions are of 4 images and targets of 2; expected the same batch"):
        center_loss(*jax.tree.map(jnp.asarray, (predictions, two, size[:2], ALL[:2])), CenterCounts(*jnp.ones(2)))
    with pytest.raises(ValueError, match=r"size_weight is -1.0; expected 0 or more"):
        CenterNetConfig(size_weight=-1.0)
    with pytest.raises(ValueError, match=r"min_overlap is 1.0; expected a value between 0 and 1"):
        CenterNetConfig(min_overlap=1.0)
    with pytest.raises(ValueError, match="stride is 0; expected 1 or more"):
        CenterNetConfig(stride=0)
    assert CenterNetConfig() == CENTERNET_LOSS


@pytest.mark.usefixtures("unchecked")
def test_refused_radius():
    with pytest.raises(ValueError, match="radius 'publish' does not exist; nearest: published"):
        functools.partial(CenterNetConfig, radius="publish")()
