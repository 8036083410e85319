"""Figures over pixels equal scikit-learn's; the split of a split, padding and devices change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eqvision.metrics import PixelConfusion, SegmentationMetric, all_reduce, pixel_confusion
from eqvision.types import IGNORE_LABEL

NAMES = tuple(f"class {k}" for k in range(5))


def drawn(n=8, size=(6, 7), seed=0):
    """Logits and labels with void pixels; class 3 is in no label, class 4 in neither."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, *size, 5)).astype(np.float32)
    labels = rng.integers(0, 3, (n, *size)).astype(np.int32)
    logits += 2 * (labels[..., None] == np.arange(5))
    logits[..., 4] = -9
    labels[rng.random(labels.shape) < 0.3] = IGNORE_LABEL
    return logits, labels, np.ones(n, np.float32)


sums = jax.jit(pixel_confusion, static_argnames="num_classes")


def metric_of(logits, labels, weights, batch=8):
    metric = SegmentationMetric(NAMES)
    for first in range(0, len(logits), batch):
        part = slice(first, first + batch)
        metric.update(sums(logits[part], labels[part], weights[part]))
    return metric


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_figures_equal_scikit_learn():
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score

    logits, labels, weights = drawn()
    metric = metric_of(logits, labels, weights)
    kept = labels != IGNORE_LABEL
    true, found = labels[kept], logits.argmax(axis=-1)[kept]
    np.testing.assert_array_equal(metric.counts, confusion_matrix(true, found, labels=range(5)))
    iou = jaccard_score(true, found, labels=range(4), average=None)
    np.testing.assert_allclose(metric.per_class()["iou"][:4], iou, rtol=1e-12)
    assert np.isnan(metric.per_class()["iou"][4])  # neither there nor found
    figures = metric.compute()
    assert figures["mean_iou"] == pytest.approx(jaccard_score(true, found, labels=range(4), average="macro"), abs=1e-12)
    assert figures["pixel_accuracy"] == pytest.approx(accuracy_score(true, found), abs=1e-12)
    assert figures["mean_accuracy"] == pytest.approx(balanced_accuracy_score(true, found), abs=1e-12)


@pytest.mark.parametrize("batch", [3, 8])
def test_the_size_of_batches_and_padding_change_nothing(batch):
    logits, labels, weights = drawn()
    whole = metric_of(logits, labels, weights)
    rows = -(-len(logits) // batch) * batch - len(logits)
    wide = [(0, rows), (0, 3), (0, 2)]
    padded = np.pad(labels, wide, constant_values=IGNORE_LABEL)
    padded[len(labels) :] = 2  # counted, if weight 0 were not looked at
    more = np.pad(logits, [*wide, (0, 0)], constant_values=np.nan)
    other = metric_of(more, padded, np.pad(weights, (0, rows)), batch)
    np.testing.assert_array_equal(whole.counts, other.counts)
    assert other.undefined == 0


def test_devices_change_nothing(mesh):
    logits, labels, weights = drawn()
    rows = P("data")
    split = jax.jit(
        jax.shard_map(lambda *x: all_reduce(pixel_confusion(*x)), mesh=mesh, in_specs=(rows, rows, rows), out_specs=P())
    )
    metric = SegmentationMetric(NAMES)
    metric.update(split(logits, labels, weights))
    np.testing.assert_array_equal(metric.counts, metric_of(logits, labels, weights).counts)


def test_maps_on_the_host_give_the_same():
    logits, labels, weights = drawn()
    metric = SegmentationMetric(NAMES)
    for found, true in zip(logits.argmax(axis=-1), labels, strict=True):
        metric.add(found.astype(np.uint8), true.astype(np.uint8))
    np.testing.assert_array_equal(metric.counts, metric_of(logits, labels, weights).counts)


def test_counts_beyond_what_float32_and_int32_hold_are_exact():
    metric = SegmentationMetric(NAMES[:2])
    batch = PixelConfusion(np.array([[2**30, 1], [0, 1]], np.int32), np.array(0, np.int32))
    for _ in range(3):
        metric.update(batch)
    assert metric.counts.tolist() == [[3 * 2**30, 3], [0, 3]]


def test_hosts_and_parts_merge(monkeypatch):
    import jax.experimental.multihost_utils as multihost

    logits, labels, weights = drawn()
    halves = [metric_of(logits[h], labels[h], weights[h]) for h in (slice(0, 3), slice(3, 8))]
    whole = metric_of(logits, labels, weights).counts
    np.testing.assert_array_equal(halves[0].merge(halves[1]).counts, whole)
    np.testing.assert_array_equal(halves[0].merge_hosts().counts, halves[0].counts)
    states = [np.frombuffer(np.append(half.counts.ravel(), 0).astype(np.int64).tobytes(), np.uint8) for half in halves]
    answers = iter([np.full((2, 1), states[0].size), np.stack(states)])
    monkeypatch.setattr(multihost, "process_allgather", lambda x: next(answers))
    np.testing.assert_array_equal(halves[0].merge_hosts().counts, whole)


@pytest.mark.parametrize("spoil", ["nan", "label"])
def test_undefined_pixels_make_every_figure_nan(spoil):
    logits, labels, weights = drawn()
    labels[0, 0, 0] = 7 if spoil == "label" else 1
    logits[0, 0, 0] = np.nan if spoil == "nan" else 0
    metric = metric_of(logits, labels, weights)
    assert metric.undefined == 1
    assert all(np.isnan(value) for value in metric.compute().values())
    assert np.isnan(metric.per_class()["iou"]).all()


def test_classes_that_only_the_model_has_are_never_found():
    logits, labels, weights = drawn()
    logits[..., 4] = 99
    confusion = sums(logits, labels, weights, num_classes=4)
    np.testing.assert_array_equal(
        confusion.counts, metric_of(logits - 999 * np.eye(5)[4], labels, weights).counts[:4, :4]
    )
    with pytest.raises(ValueError, match="the logits have 5 classes and the data 6"):
        pixel_confusion(jnp.array(logits), jnp.array(labels), jnp.array(weights), num_classes=6)


def test_no_pixel_is_not_a_score_of_0():
    assert all(np.isnan(value) for value in SegmentationMetric(NAMES).compute().values())


def test_the_table_has_a_line_for_each_class():
    metric = SegmentationMetric(("sky", "a road", "car"))
    metric.add(np.array([[0, 0, 1, 1]], np.uint8), np.array([[0, 1, 1, 255]], np.uint8))
    assert [line.split() for line in metric.table().splitlines()] == [
        ["class", "iou", "accuracy", "precision", "share"],
        ["sky", "50.0", "100.0", "50.0", "33.3"],
        ["a", "road", "50.0", "50.0", "100.0", "66.7"],
        ["car", "-", "-", "-", "0.0"],
        ["mean", "over", "classes", "50.0", "75.0", "75.0"],
        ["all", "pixels", "66.7"],
    ]
    assert len({len(line) for line in metric.table().splitlines()[:4]}) == 1


def test_what_does_not_fit_is_refused():
    metric = SegmentationMetric(NAMES)
    add = functools.partial(metric.add, np.array([[5]], np.uint8))
    with pytest.raises(ValueError, match="predicted classes reach from 5 to 5; expected 0 to 4"):
        add(np.array([[0]], np.uint8))
    add(np.array([[255]], np.uint8))  # void: nothing is asked of it
    with pytest.raises(ValueError, match="expected those of 5 classes"):
        metric.update(PixelConfusion(np.zeros((2, 2), np.int32), np.array(0, np.int32)))
    with pytest.raises(ValueError, match="metrics of different classes"):
        metric.merge(SegmentationMetric(("a",)))


@pytest.mark.usefixtures("unchecked")
def test_maps_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"the predicted map is \(1, 1\), the labels \(1, 2\); expected one shape"):
        SegmentationMetric(NAMES).add(np.zeros((1, 1), np.uint8), np.zeros((1, 2), np.uint8))
