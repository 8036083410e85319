"""Metrics against sklearn and float64 references; padding, batch sizes, merge order, devices, messages."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sklearn import metrics as sklearn_metrics

from eqvision import losses, metrics

NUM_CLASSES = 6
EXAMPLES = 48
NAN = float("nan")


def draw(examples=EXAMPLES, seed=0):
    """Logits that favour the label, so that no metric sits at 0 or at 1."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, examples).astype(np.int32)
    logits = rng.normal(size=(examples, NUM_CLASSES)) + 1.5 * np.eye(NUM_CLASSES)[labels]
    return logits.astype(np.float32), labels


def multi_hot(examples=EXAMPLES, seed=1):
    rows = np.random.default_rng(seed).uniform(size=(examples, NUM_CLASSES)) < 0.4
    rows[:, 0] |= ~rows.any(axis=1)
    return rows.astype(np.float32)


def uneven_weights():
    return np.random.default_rng(2).integers(0, 4, EXAMPLES).astype(np.float32)


def single_label_sums(logits, labels, weights):
    return {
        "top1": metrics.accuracy(logits, labels, weights),
        "top3": metrics.accuracy(logits, labels, weights, top=3),
        "loss": metrics.Mean.of(losses.softmax_cross_entropy(logits, labels), weights),
        "confusion": metrics.confusion_matrix(logits, labels, weights),
        "calibration": metrics.calibration_error(logits, labels, weights),
        "error": metrics.mean_squared_error(logits, jnp.broadcast_to(weights[:, None], logits.shape), weights),
    }


def multi_label_sums(logits, rows, weights):
    return {
        "precision": metrics.precision_at_k(logits, rows, weights),
        "precision3": metrics.precision_at_k(logits, rows, weights, k=3),
        "recall": metrics.recall(logits, rows, weights),
        "error": metrics.mean_absolute_error(logits, rows, weights),
    }


def on_device(sums, *arrays):
    return jax.jit(sums)(*map(jnp.asarray, arrays))


def evaluate(sums, *arrays):
    return metrics.compute(on_device(sums, *arrays))


# the numbers


def test_accuracy_equals_sklearn():
    logits, labels = draw()
    weights = uneven_weights()
    results = evaluate(single_label_sums, logits, labels, weights)
    expected = sklearn_metrics.accuracy_score(labels, logits.argmax(axis=1), sample_weight=weights)
    assert results["top1"] == pytest.approx(expected, rel=1e-6)
    expected = sklearn_metrics.top_k_accuracy_score(labels, logits, k=3, sample_weight=weights)
    assert results["top3"] == pytest.approx(expected, rel=1e-6)
    assert 0.2 < results["top1"] < results["top3"] < 1


def test_accuracy_takes_rows_and_indices():
    logits, labels = map(jnp.asarray, draw())
    rows = 0.7 * jax.nn.one_hot(labels, NUM_CLASSES) + 0.05
    for top in (1, 3):
        by_index = metrics.accuracy(logits, labels, jnp.ones(EXAMPLES), top=top)
        assert metrics.accuracy(logits, rows, jnp.ones(EXAMPLES), top=top) == by_index


@pytest.mark.parametrize("top", [1, 2, 4])
def test_accuracy_ranks_ties_like_top_k(top):
    logits = jnp.asarray(np.random.default_rng(0).integers(0, 3, (EXAMPLES, NUM_CLASSES)), jnp.float32)
    labels = jnp.asarray(draw()[1])
    expected = (jax.lax.top_k(logits, top)[1] == labels[:, None]).any(axis=1).mean()
    assert metrics.accuracy(logits, labels, jnp.ones(EXAMPLES), top=top).compute() == pytest.approx(float(expected))


@pytest.mark.parametrize("k", [1, 3, NUM_CLASSES])
def test_precision_at_k_counts_positives_among_the_best(k):
    logits, rows, weights = draw()[0], multi_hot(), uneven_weights()
    best = np.argsort(-logits, axis=1)[:, :k]
    expected = np.average(np.take_along_axis(rows, best, axis=1).mean(axis=1), weights=weights)
    result = metrics.precision_at_k(*map(jnp.asarray, (logits, rows, weights)), k=k).compute()
    assert result == pytest.approx(expected, rel=1e-6)


def test_recall_equals_sklearn_on_as_many_predictions_as_positives():
    logits, rows, weights = draw()[0], multi_hot(), uneven_weights()
    rows[:4] = 0  # no positives: counted as 0 by both
    ranks = np.argsort(np.argsort(-logits, axis=1), axis=1)
    predicted = ranks < rows.sum(axis=1, keepdims=True)
    expected = sklearn_metrics.recall_score(
        rows.astype(int), predicted, average="samples", sample_weight=weights, zero_division=0
    )
    result = metrics.recall(*map(jnp.asarray, (logits, rows, weights))).compute()
    assert result == pytest.approx(expected, rel=1e-6)
    assert 0.2 < result < 1


def test_confusion_matrix_equals_sklearn():
    logits, labels = draw()
    weights = uneven_weights()
    result = metrics.confusion_matrix(*map(jnp.asarray, (logits, labels, weights)))
    expected = sklearn_metrics.confusion_matrix(labels, logits.argmax(axis=1), sample_weight=weights)
    np.testing.assert_array_equal(result.counts, expected)
    normalized = sklearn_metrics.confusion_matrix(
        labels, logits.argmax(axis=1), sample_weight=weights, normalize="true"
    )
    np.testing.assert_allclose(result.normalized(), normalized, rtol=1e-12)
    np.testing.assert_allclose(result.class_accuracy(), np.diagonal(normalized), rtol=1e-12)
    balanced = sklearn_metrics.balanced_accuracy_score(labels, logits.argmax(axis=1), sample_weight=weights)
    assert result.compute()["mean_class_accuracy"] == pytest.approx(balanced)
    accuracy = sklearn_metrics.accuracy_score(labels, logits.argmax(axis=1), sample_weight=weights)
    assert result.compute()["accuracy"] == pytest.approx(accuracy)


def test_absent_class_has_no_accuracy_and_is_left_out_of_the_mean():
    logits, labels = jnp.eye(3)[jnp.array([0, 0, 1, 2])], jnp.array([0, 1, 1, 1])
    result = metrics.confusion_matrix(logits, labels, jnp.ones(4))
    np.testing.assert_allclose(result.class_accuracy(), [1.0, 1 / 3, NAN])
    assert result.compute() == pytest.approx({"accuracy": 0.5, "mean_class_accuracy": 2 / 3})


def calibration64(logits, labels, weights, num_bins):
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    confidence, correct = p.max(axis=1), p.argmax(axis=1) == labels
    edges, error = np.linspace(0, 1, num_bins + 1), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        error += abs((weights * (correct - confidence))[inside].sum())
    return error / weights.sum()


@pytest.mark.parametrize("num_bins", [1, 5, 15])
def test_calibration_error_follows_its_formula(num_bins):
    logits, labels = draw()
    weights = uneven_weights()
    result = metrics.calibration_error(*map(jnp.asarray, (logits, labels, weights)), num_bins=num_bins)
    assert result.weight.shape == (num_bins,)
    assert result.weight.sum() == weights.sum()
    assert result.compute() == pytest.approx(calibration64(logits, labels, weights, num_bins), rel=1e-5)


def test_calibration_bins_are_closed_above_and_hold_certainty():
    logits = jnp.log(jnp.array([[0.5, 0.5], [1.0, 0.0], [0.7, 0.3], [0.8, 0.2]]))
    result = metrics.calibration_error(logits, jnp.zeros(4, jnp.int32), jnp.ones(4), num_bins=4)
    np.testing.assert_array_equal(result.weight, [0, 1, 1, 2])


def test_certain_and_right_is_calibrated_and_certain_and_wrong_is_not():
    logits = 100 * jnp.eye(NUM_CLASSES)
    right, wrong = jnp.arange(NUM_CLASSES), jnp.roll(jnp.arange(NUM_CLASSES), 1)
    assert metrics.calibration_error(logits, right, jnp.ones(NUM_CLASSES)).compute() == 0
    assert metrics.calibration_error(logits, wrong, jnp.ones(NUM_CLASSES)).compute() == 1


def test_regression_errors_equal_sklearn():
    predictions, targets, weights = draw()[0], draw(seed=5)[0], uneven_weights()
    arrays = [jnp.asarray(x) for x in (predictions, targets, weights)]
    expected = sklearn_metrics.mean_squared_error(targets, predictions, sample_weight=weights)
    assert metrics.mean_squared_error(*arrays).compute() == pytest.approx(expected, rel=1e-6)
    expected = sklearn_metrics.mean_absolute_error(targets, predictions, sample_weight=weights)
    assert metrics.mean_absolute_error(*arrays).compute() == pytest.approx(expected, rel=1e-6)


def test_mean_weighs_its_values():
    mean = metrics.Mean.of(jnp.array([1.0, 4.0, NAN]), jnp.array([1.0, 2.0, 0.0]))
    assert mean.compute() == 3.0


def test_half_precision_logits_are_judged_in_float32():
    logits, labels = draw()
    weights, half = jnp.ones(EXAMPLES), jnp.asarray(logits).astype(jnp.bfloat16)
    sums = single_label_sums(half, jnp.asarray(labels), weights)
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype("float32")}
    full = single_label_sums(half.astype(jnp.float32), jnp.asarray(labels), weights)
    assert metrics.compute(sums) == metrics.compute(full)


# every example exactly once


TASKS = {
    "single label": (single_label_sums, (*draw(), uneven_weights())),
    "multi label": (multi_label_sums, (draw()[0], multi_hot(), uneven_weights())),
}
every_task = pytest.mark.parametrize(("sums", "arrays"), TASKS.values(), ids=TASKS)


@every_task
@pytest.mark.parametrize("batch", [1, 7, 16])
def test_results_do_not_depend_on_the_batch_size(sums, arrays, batch):
    parts = [on_device(sums, *(x[i : i + batch] for x in arrays)) for i in range(0, EXAMPLES, batch)]
    total = metrics.zeros_like(parts[0])
    for part in parts:
        total = metrics.merge(total, part)
    assert metrics.compute(total) == pytest.approx(evaluate(sums, *arrays), rel=1e-6)


@every_task
def test_merge_order_does_not_matter(sums, arrays):
    a, b, c = (on_device(sums, *(x[i::3] for x in arrays)) for i in range(3))
    left = metrics.merge(metrics.merge(a, b), c)
    right = metrics.merge(b, metrics.merge(c, a))
    assert metrics.compute(left) == pytest.approx(metrics.compute(right), rel=1e-6)


@every_task
def test_padding_changes_not_one_bit(sums, arrays):
    logits, labels, weights = (np.concatenate([x, x[:5]]) for x in arrays)
    logits[-5:], weights[-5:] = np.nan, 0
    labels[-5:] = -1 if labels.ndim == 1 else np.nan
    padded = metrics.compute(on_device(sums, logits, labels, weights))
    zeroed = metrics.compute(on_device(sums, *(np.concatenate([x, np.zeros_like(x[:5])]) for x in arrays)))
    assert padded == zeroed
    assert padded == pytest.approx(evaluate(sums, *arrays), rel=1e-6)


@every_task
def test_nothing_counted_is_nan_not_zero(sums, arrays):
    empty = metrics.zeros_like(jax.eval_shape(sums, *map(jnp.asarray, arrays)))
    results = metrics.compute(empty)
    assert results
    assert all(np.isnan(value) for value in results.values())


@every_task
def test_nan_logits_of_a_counted_row_are_loud(sums, arrays):
    logits, labels, weights = (x.copy() for x in arrays)
    row = int(weights.argmax())
    logits[row, 1] = np.nan
    assert all(np.isnan(value) for value in evaluate(sums, logits, labels, weights).values())


@pytest.mark.parametrize("bad", [-1, NUM_CLASSES])
def test_label_out_of_range_of_a_counted_row_is_loud(bad):
    logits, labels = draw()
    labels[3] = bad
    results = evaluate(single_label_sums, logits, labels, np.ones(EXAMPLES, np.float32))
    del results["error"]  # does not read the labels
    assert len(results) == 6
    assert all(np.isnan(value) for value in results.values())


# devices


@every_task
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "model": 2}])
def test_eight_devices_count_like_one(sums, arrays, axes):
    if len(jax.devices()) < 8:
        pytest.fail("this test needs 8 devices: set jax_num_cpu_devices=8 before jax starts (tests/conftest.py)")
    logits, labels, weights = (x.copy() for x in arrays)
    weights[-15:], logits[-15:] = 0, np.nan  # the last devices hold nothing but padding
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    split = P(tuple(axis for axis in axes if axis != "model"))
    reduced = jax.shard_map(
        lambda *batch: metrics.all_reduce(sums(*batch)), mesh=mesh, in_specs=(split,) * 3, out_specs=P()
    )
    result, expected = evaluate(reduced, logits, labels, weights), evaluate(sums, logits, labels, weights)
    assert result == pytest.approx(expected, rel=1e-6)
    assert not any(np.isnan(value) for value in result.values())


@every_task
def test_weights_made_on_the_device_count_on_every_device(sums, arrays):
    logits, labels, _ = arrays

    def local(logits, labels):
        return metrics.all_reduce(sums(logits, labels, jnp.ones(len(labels))))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P())
    expected = evaluate(sums, logits, labels, np.ones(EXAMPLES, np.float32))
    assert evaluate(split, logits, labels) == pytest.approx(expected, rel=1e-6)


# mean average precision


def filled(scores, rows, weights, batch=EXAMPLES):
    metric = metrics.MeanAveragePrecision()
    for i in range(0, len(scores), batch):
        metric.update(scores[i : i + batch], rows[i : i + batch], weights[i : i + batch])
    return metric


@pytest.mark.parametrize("weights", [np.ones(EXAMPLES, np.float32), uneven_weights()], ids=["equal", "uneven"])
@pytest.mark.parametrize("decimals", [6, 0], ids=["distinct", "ties"])
def test_mean_average_precision_equals_sklearn(weights, decimals):
    scores, rows = np.round(draw()[0], decimals), multi_hot()
    metric = filled(scores, rows, weights)
    each = sklearn_metrics.average_precision_score(rows, scores, average=None, sample_weight=weights)
    np.testing.assert_allclose(metric.per_class(), each, rtol=1e-12)
    macro = sklearn_metrics.average_precision_score(rows, scores, average="macro", sample_weight=weights)
    assert metric.compute() == pytest.approx(macro, rel=1e-12)


def test_mean_average_precision_leaves_out_classes_without_positives():
    scores, rows = draw()[0], multi_hot()
    rows[:, 2] = 0
    kept = np.arange(NUM_CLASSES) != 2
    metric = filled(scores, rows, np.ones(EXAMPLES))
    expected = sklearn_metrics.average_precision_score(rows[:, kept], scores[:, kept], average="macro")
    assert np.isnan(metric.per_class()[2])
    assert metric.compute() == pytest.approx(expected, rel=1e-12)
    assert np.isnan(filled(scores, np.zeros_like(rows), np.ones(EXAMPLES)).compute())
    assert np.isnan(filled(scores, rows, np.zeros(EXAMPLES)).compute())


def test_mean_average_precision_ignores_padding_batch_size_and_order():
    scores, rows, weights = np.round(draw()[0]), multi_hot(), uneven_weights()
    expected = filled(scores, rows, weights).compute()
    padded = [np.concatenate([x, np.full_like(x[:5], fill)]) for x, fill in ((scores, NAN), (rows, NAN), (weights, 0))]
    assert filled(*padded, batch=7).compute() == pytest.approx(expected, rel=1e-12)
    halves = [filled(scores[i::2], rows[i::2], weights[i::2]) for i in (0, 1)]
    assert halves[0].merge(halves[1]).compute() == pytest.approx(expected, rel=1e-12)
    assert halves[1].merge(halves[0]).compute() == pytest.approx(expected, rel=1e-12)


def test_merging_leaves_its_inputs_alone():
    scores, rows, weights = draw()[0], multi_hot(), np.ones(EXAMPLES)
    first, second = filled(scores[:20], rows[:20], weights[:20]), filled(scores[20:], rows[20:], weights[20:])
    before = first.compute()
    first.merge(second).update(scores, rows, weights)
    assert first.compute() == before


def test_device_and_host_metrics_compute_together():
    logits, rows = draw()[0], multi_hot()
    sums = on_device(multi_label_sums, logits, rows, np.ones(EXAMPLES, np.float32))
    results = metrics.compute({**sums, "mAP": filled(logits, rows, np.ones(EXAMPLES))})
    assert set(results) == {*sums, "mAP"}
    assert {type(value) for value in results.values()} == {float}


# messages and the shape of results


def test_a_metric_of_several_values_is_named_by_part():
    results = evaluate(single_label_sums, *draw(), np.ones(EXAMPLES, np.float32))
    assert {"top1", "confusion/accuracy", "confusion/mean_class_accuracy"} < set(results)
    assert results["confusion/accuracy"] == results["top1"]


@pytest.mark.parametrize(("metric", "name"), [(metrics.accuracy, "top"), (metrics.precision_at_k, "k")])
@pytest.mark.parametrize("rank", [0, NUM_CLASSES + 1])
def test_rank_must_be_within_the_classes(metric, name, rank):
    with pytest.raises(ValueError, match=rf"^{name} is {rank}, but there are 6 classes; expected 1 to 6"):
        metric(jnp.zeros((4, NUM_CLASSES)), jnp.zeros(4, jnp.int32), jnp.ones(4), **{name: rank})


@pytest.mark.parametrize(
    "metric",
    [
        metrics.accuracy,
        metrics.precision_at_k,
        metrics.recall,
        metrics.confusion_matrix,
        metrics.calibration_error,
    ],
)
def test_labels_that_would_broadcast_are_refused(metric):
    with pytest.raises(ValueError, match=r"labels have shape \(4, 1\).*logits have shape \(4, 6\)"):
        metric(jnp.zeros((4, NUM_CLASSES)), jnp.zeros((4, 1), jnp.int32), jnp.ones(4))


def test_calibration_needs_a_bin():
    with pytest.raises(ValueError, match="num_bins is 0; expected 1 or more"):
        metrics.calibration_error(jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32), jnp.ones(4), num_bins=0)


def test_mean_average_precision_says_what_is_wrong():
    metric = metrics.MeanAveragePrecision()
    with pytest.raises(ValueError, match="no batch; call update"):
        metric.compute()
    scores, rows, weights = draw()[0], multi_hot(), np.ones(EXAMPLES)
    with pytest.raises(ValueError, match="labels hold values other than 0 and 1"):
        metric.update(scores, 0.5 * rows, weights)
    broken = scores.copy()
    broken[[2, 5], 1] = np.nan
    with pytest.raises(ValueError, match="NaN in 2 of 48 counted rows"):
        metric.update(broken, rows, weights)
    metric.update(scores, rows, weights)
    metric.update(scores[:, :4], rows[:, :4], weights)
    with pytest.raises(ValueError, match=r"different numbers of classes: \[4, 6\]"):
        metric.compute()
