"""Tasks: the loss and the metrics of a problem, against scikit-learn and hand-computed values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, confusion_matrix, log_loss

from eqvision.losses import weighted_mean
from eqvision.metrics import compute, merge
from eqvision.tasks import MultiLabel, Regression, SingleLabel, Task, make_task
from eqvision.types import ClassificationBatch


def batch_of(labels, weights=None, start: int = 0):
    """Labels and weights; tasks do not look at the images."""
    count = len(labels)
    weights = np.ones(count) if weights is None else weights
    return ClassificationBatch(
        images=jnp.zeros((count, 1, 1, 1), jnp.uint8),
        labels=jnp.asarray(labels),
        weights=jnp.asarray(weights, jnp.float32),
        indices=jnp.arange(start, start + count, dtype=jnp.int32),
    )


def random_problem(kind: str, count: int = 30, classes: int = 4):
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(count, classes)).astype(np.float32)
    labels = {
        "single_label": rng.integers(0, classes, count, dtype=np.int32),
        "multi_label": rng.integers(0, 2, (count, classes)).astype(np.float32),
        "regression": rng.normal(size=(count, classes)).astype(np.float32),
    }[kind]
    return outputs, labels


KINDS = {
    "single_label": ("cross_entropy", "focal"),
    "multi_label": ("cross_entropy", "focal"),
    "regression": ("squared_error", "absolute_error"),
}
PAIRS = [(kind, loss) for kind, losses in KINDS.items() for loss in losses]


def values_of(task, outputs, labels, weights=None):
    return compute(task.metrics(jnp.asarray(outputs), batch_of(labels, weights)))


# Numbers


def test_single_label_metrics_equal_sklearn():
    outputs, labels = random_problem("single_label")
    task = SingleLabel()
    found = task.metrics(jnp.asarray(outputs), batch_of(labels))
    probabilities = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    assert found["accuracy"].compute() == pytest.approx(accuracy_score(labels, outputs.argmax(axis=1)))
    assert found["loss"].compute() == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
    np.testing.assert_array_equal(found["confusion"].counts, confusion_matrix(labels, outputs.argmax(axis=1)))


def test_top5_is_reported_where_there_are_more_than_five_classes():
    assert "top5_accuracy" not in values_of(SingleLabel(), *random_problem("single_label", classes=5))
    outputs, labels = random_problem("single_label", classes=9)
    hits = [label in row.argsort()[-5:] for row, label in zip(outputs, labels, strict=True)]
    assert values_of(SingleLabel(), outputs, labels)["top5_accuracy"] == pytest.approx(np.mean(hits))


def test_multi_label_loss_and_mean_average_precision():
    outputs, labels = random_problem("multi_label")
    task, host = MultiLabel(), MultiLabel().host_metrics()
    host[task.headline].update(outputs, labels, np.ones(len(outputs), np.float32))
    assert compute(host)[task.headline] == pytest.approx(average_precision_score(labels, outputs, average="macro"))
    p = 1 / (1 + np.exp(-outputs.astype(np.float64)))
    expected = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).sum(axis=1).mean()
    assert values_of(task, outputs, labels)["loss"] == pytest.approx(expected, rel=1e-5)


def test_regression_errors():
    outputs, labels = random_problem("regression")
    squared, absolute = ((outputs - labels) ** 2).mean(), np.abs(outputs - labels).mean()
    for loss, expected in (("squared_error", squared), ("absolute_error", absolute)):
        found = values_of(Regression(loss), outputs, labels)
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
        assert found["mean_squared_error"] == pytest.approx(squared, rel=1e-5)
        assert found["mean_absolute_error"] == pytest.approx(absolute, rel=1e-5)


def test_regression_takes_whole_numbers_as_one_column():
    found = values_of(Regression(), [[1.0], [5.0]], np.array([3, 4], np.int32))
    assert found["mean_squared_error"] == pytest.approx((4 + 1) / 2)


def test_label_smoothing_reaches_the_loss():
    outputs, labels = random_problem("single_label")
    log_p = outputs - np.log(np.exp(outputs).sum(axis=1, keepdims=True))
    targets = np.eye(4)[labels] * 0.8 + 0.2 / 4
    loss = SingleLabel(label_smoothing=0.2).loss(jnp.asarray(outputs), batch_of(labels))
    np.testing.assert_allclose(loss.values, -(targets * log_p).sum(axis=1), rtol=1e-5)


def test_focal_loss_is_below_cross_entropy():
    outputs, labels = random_problem("single_label")
    batch = batch_of(labels)
    focal, plain = (SingleLabel(loss).loss(jnp.asarray(outputs), batch).values for loss in ("focal", "cross_entropy"))
    p = jnp.exp(-plain)
    np.testing.assert_allclose(focal, (1 - p) ** 2 * plain, rtol=1e-4)


# Padding and batches


@pytest.mark.parametrize(("kind", "loss"), PAIRS)
def test_rows_of_weight_0_change_nothing_even_if_they_hold_nan(kind, loss):
    task = make_task(kind, loss)
    outputs, labels = random_problem(kind)
    junk_labels = np.zeros_like(labels[:7]) if kind == "single_label" else np.full_like(labels[:7], np.nan)
    padded = jnp.concatenate([outputs, np.full_like(outputs[:7], np.nan)])
    padded_labels, weights = np.concatenate([labels, junk_labels]), np.array([1.0] * 30 + [0.0] * 7)
    plain = task.metrics(jnp.asarray(outputs), batch_of(labels))
    junk = task.metrics(padded, batch_of(padded_labels, weights))
    # two lengths are summed in two orders, so equal up to float32 rounding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-6), plain, junk)

    def mean(outputs, labels, weights):
        return weighted_mean(*task.loss(outputs, batch_of(labels, weights)))

    one = jax.grad(mean)(jnp.asarray(outputs), labels, np.ones(30))
    other = jax.grad(mean)(padded, padded_labels, weights)
    np.testing.assert_allclose(other[:30], one, rtol=1e-6)
    np.testing.assert_array_equal(other[30:], 0)


@pytest.mark.parametrize(("kind", "loss"), PAIRS)
def test_metrics_of_batches_merge_to_those_of_the_whole(kind, loss):
    task = make_task(kind, loss)
    outputs, labels = random_problem(kind)
    whole = values_of(task, outputs, labels)
    rows = (slice(0, 7), slice(7, 20), slice(20, 30))
    parts = [task.metrics(jnp.asarray(outputs[r]), batch_of(labels[r])) for r in rows]
    merged = compute(merge(merge(parts[0], parts[1]), parts[2]))
    assert merged == pytest.approx(whole, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize(("kind", "loss"), PAIRS)
def test_the_headline_is_among_the_metrics(kind, loss):
    task = make_task(kind, loss)
    assert isinstance(task, Task)
    outputs, labels = random_problem(kind)
    assert task.headline in {**values_of(task, outputs, labels), **task.host_metrics()}


# Building


@pytest.mark.parametrize(("kind", "loss"), PAIRS)
def test_make_task(kind, loss):
    expected = {"single_label": SingleLabel, "multi_label": MultiLabel, "regression": Regression}[kind]
    task = make_task(kind, loss)
    assert type(task) is expected
    assert task.loss_name == loss


def test_smoothing_is_passed_on():
    assert make_task("multi_label", "cross_entropy", 0.3).label_smoothing == 0.3


@pytest.mark.parametrize(
    ("kind", "loss"),
    [("regression", "cross_entropy"), ("single_label", "squared_error"), ("multi_label", "absolute_error")],
)
def test_a_loss_of_another_kind_is_refused(kind, loss):
    expected = rf"task\.loss '{loss}' does not fit task\.kind '{kind}'; choose from {', '.join(KINDS[kind])}"
    with pytest.raises(ValueError, match=expected):
        make_task(kind, loss)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"task\.kind is 'multilabel'; choose from single_label, multi_label"):
        make_task("multilabel", "cross_entropy")


def test_label_smoothing_that_no_loss_uses_is_refused():
    for kind, loss in (("single_label", "focal"), ("multi_label", "focal"), ("regression", "squared_error")):
        with pytest.raises(ValueError, match="label_smoothing"):
            make_task(kind, loss, 0.1)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 1.5])
def test_label_smoothing_outside_its_range_is_refused(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        make_task("single_label", "cross_entropy", smoothing)
