"""Losses against float64 references and torch; padding, device counts, extreme logits, messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from eqvision import losses

NUM_CLASSES = 7
CLASSIFICATION = {
    "softmax_cross_entropy": losses.softmax_cross_entropy,
    "sigmoid_cross_entropy": losses.sigmoid_cross_entropy,
    "softmax_focal": losses.softmax_focal,
    "sigmoid_focal": losses.sigmoid_focal,
}
REGRESSION = {
    "squared_error": losses.squared_error,
    "absolute_error": losses.absolute_error,
    "smooth_l1": losses.smooth_l1,
    "huber": losses.huber,
}
every_classification_loss = pytest.mark.parametrize("loss", CLASSIFICATION.values(), ids=CLASSIFICATION)


def draw(batch=16, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(batch, NUM_CLASSES)) * 4
    return logits.astype(np.float32), rng.integers(0, NUM_CLASSES, batch).astype(np.int32)


def soft_rows(batch=16, seed=1):
    rows = np.random.default_rng(seed).uniform(size=(batch, NUM_CLASSES))
    return (rows / rows.sum(axis=1, keepdims=True)).astype(np.float32)


def multi_hot(batch=16, seed=2):
    return (np.random.default_rng(seed).uniform(size=(batch, NUM_CLASSES)) < 0.3).astype(np.float32)


def class_weights():
    return jnp.linspace(0.2, 2.0, NUM_CLASSES)


def close(actual, expected):
    expected = np.asarray(expected)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=1e-5, atol=1e-6 * scale)


# float64 references


def log_softmax64(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def smooth64(rows, smoothing):
    return np.asarray(rows, np.float64) * (1 - smoothing) + smoothing / NUM_CLASSES


def sigmoid64(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def softmax_cross_entropy64(logits, rows, smoothing=0.0):
    return -(smooth64(rows, smoothing) * log_softmax64(logits)).sum(axis=1)


def sigmoid_cross_entropy64(logits, rows, smoothing=0.0):
    p, t = sigmoid64(logits), smooth64(rows, smoothing)
    return -(t * np.log(p) + (1 - t) * np.log(1 - p)).sum(axis=1)


def softmax_focal64(logits, rows, gamma=2.0):
    log_p = log_softmax64(logits)
    return -(rows * (1 - np.exp(log_p)) ** gamma * log_p).sum(axis=1)


def sigmoid_focal64(logits, rows, alpha=0.25, gamma=2.0):
    p = sigmoid64(logits)
    p_t, alpha_t = np.where(rows, p, 1 - p), np.where(rows, alpha, 1 - alpha)
    return -(alpha_t * (1 - p_t) ** gamma * np.log(p_t)).sum(axis=1)


REFERENCES = {
    "softmax_cross_entropy": softmax_cross_entropy64,
    "sigmoid_cross_entropy": sigmoid_cross_entropy64,
    "softmax_focal": softmax_focal64,
    "sigmoid_focal": sigmoid_focal64,
}


@pytest.mark.parametrize("name", ["softmax_cross_entropy", "sigmoid_cross_entropy"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [soft_rows(), multi_hot()], ids=["soft", "multi-hot"])
def test_cross_entropy_follows_its_formula(name, smoothing, rows):
    logits, _ = draw()
    actual = CLASSIFICATION[name](jnp.array(logits), jnp.array(rows), label_smoothing=smoothing)
    close(actual, REFERENCES[name](logits, rows, smoothing))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_softmax_focal_follows_its_formula(gamma):
    logits, rows = draw()[0], soft_rows()
    actual = losses.softmax_focal(jnp.array(logits), jnp.array(rows), gamma=gamma)
    close(actual, softmax_focal64(logits, rows, gamma))


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.9, 0.5), (0.5, 0.0)])
def test_sigmoid_focal_follows_its_formula(alpha, gamma):
    logits, rows = draw()[0], multi_hot()
    actual = losses.sigmoid_focal(jnp.array(logits), jnp.array(rows), alpha=alpha, gamma=gamma)
    close(actual, sigmoid_focal64(logits, rows, alpha, gamma))


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_gradient_equals_differences_of_the_float64_formula(name):
    logits, labels = draw(6)
    rows, step = np.eye(NUM_CLASSES)[labels], 1e-5
    expected = np.zeros(logits.shape)
    for i in range(NUM_CLASSES):
        shift = step * np.eye(NUM_CLASSES)[i]
        ahead, behind = (REFERENCES[name](logits + s, rows) for s in (shift, -shift))
        expected[:, i] = (ahead - behind) / (2 * step)
    close(jax.grad(lambda x: CLASSIFICATION[name](x, jnp.array(labels)).sum())(jnp.array(logits)), expected)


def test_soft_labels_give_the_expected_sigmoid_focal_loss():
    logits, rows = jnp.array(draw()[0]), jnp.array(multi_hot())
    mixed = losses.sigmoid_focal(logits, 0.3 * rows + 0.7 * (1 - rows))
    close(mixed, 0.3 * losses.sigmoid_focal(logits, rows) + 0.7 * losses.sigmoid_focal(logits, 1 - rows))


def test_focal_without_focus_is_cross_entropy():
    logits, rows = jnp.array(draw()[0]), jnp.array(multi_hot())
    close(losses.softmax_focal(logits, rows, gamma=0.0), losses.softmax_cross_entropy(logits, rows))
    close(losses.sigmoid_focal(logits, rows, alpha=None, gamma=0.0), losses.sigmoid_cross_entropy(logits, rows))


@every_classification_loss
def test_class_indices_equal_one_hot_rows(loss):
    logits, labels = draw()
    rows = np.eye(NUM_CLASSES, dtype=np.float32)[labels]
    by_index = loss(jnp.array(logits), jnp.array(labels))
    np.testing.assert_array_equal(by_index, loss(jnp.array(logits), jnp.array(rows)))
    np.testing.assert_array_equal(by_index, loss(jnp.array(logits), jnp.array(labels.astype(np.uint8))))


@every_classification_loss
def test_half_precision_logits_give_the_float32_value(loss):
    logits, labels = draw()
    half = jnp.array(logits).astype(jnp.bfloat16)
    result = loss(half, jnp.array(labels))
    assert result.dtype == jnp.float32
    assert result.shape == labels.shape
    np.testing.assert_array_equal(result, loss(half.astype(jnp.float32), jnp.array(labels)))


@every_classification_loss
@pytest.mark.parametrize("bad", [-1, NUM_CLASSES, 10_000])
def test_class_index_out_of_range_is_nan(loss, bad):
    logits, labels = draw()
    labels[3] = bad
    result = np.asarray(loss(jnp.array(logits), jnp.array(labels)))
    assert np.isnan(result[3])
    assert np.isfinite(np.delete(result, 3)).all()


@every_classification_loss
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_extreme_logits_have_finite_values_and_gradients(loss, scale):
    signs, labels = draw()
    logits = jnp.array(np.sign(signs) * scale, jnp.float32)
    values, gradient = jax.value_and_grad(lambda x: loss(x, jnp.array(labels)).mean())(logits)
    assert np.isfinite(values)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", [losses.softmax_focal, losses.sigmoid_focal])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_focal_gradient_is_finite_for_certain_predictions(loss, gamma):
    logits = jnp.array([[500.0] + [-500.0] * (NUM_CLASSES - 1), [-500.0] + [500.0] * (NUM_CLASSES - 1)])
    for labels in (jnp.array([0, 0]), jnp.array(soft_rows(2))):
        assert np.isfinite(jax.grad(lambda x, t=labels: loss(x, t, gamma=gamma).sum())(logits)).all()


def test_masked_out_class_is_legal():
    logits, labels = draw()
    logits[:, 2], labels[labels == 2] = -np.inf, 0
    for loss in (losses.softmax_cross_entropy, losses.softmax_focal):
        values, gradient = jax.value_and_grad(lambda x, f=loss: f(x, jnp.array(labels)).sum())(jnp.array(logits))
        assert np.isfinite(values)
        assert np.isfinite(gradient).all()
        kept = np.delete(logits, 2, axis=1)
        close(values, loss(jnp.array(kept), jnp.array(labels - (labels > 2))).sum())


def test_initial_loss():
    logits, labels = jnp.zeros((4, NUM_CLASSES)), jnp.arange(4)
    close(losses.softmax_cross_entropy(logits, labels), np.full(4, np.log(NUM_CLASSES)))
    close(losses.sigmoid_cross_entropy(logits, labels), np.full(4, NUM_CLASSES * np.log(2)))


# torch


@pytest.mark.parity
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_softmax_cross_entropy_equals_torch(smoothing, weighted, soft):
    torch = pytest.importorskip("torch")
    logits, labels = draw()
    labels = soft_rows() if soft else labels
    weights = class_weights() if weighted else None
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits),
        torch.tensor(labels if soft else labels.astype(np.int64)),
        weight=torch.tensor(np.asarray(weights)) if weighted else None,
        label_smoothing=smoothing,
        reduction="none",
    )
    actual = losses.softmax_cross_entropy(
        jnp.array(logits), jnp.array(labels), label_smoothing=smoothing, class_weights=weights
    )
    close(actual, expected.numpy())


@pytest.mark.parity
@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_cross_entropy_equals_torch(weighted):
    torch = pytest.importorskip("torch")
    logits, rows = draw()[0], multi_hot()
    weights = class_weights() if weighted else None
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits),
        torch.tensor(rows),
        weight=torch.tensor(np.asarray(weights)) if weighted else None,
        reduction="none",
    )
    actual = losses.sigmoid_cross_entropy(jnp.array(logits), jnp.array(rows), class_weights=weights)
    close(actual, expected.sum(dim=1).numpy())


@pytest.mark.parity
@pytest.mark.parametrize("width", [0.3, 1.0, 2.5])
def test_regression_losses_equal_torch(width):
    torch = pytest.importorskip("torch")
    predictions, targets = draw()[0], draw(seed=3)[0]
    pair, torch_pair = (
        map(jnp.array, (predictions, targets)),
        (torch.tensor(predictions), torch.tensor(targets)),
    )
    x, y = pair
    functional = torch.nn.functional
    close(losses.squared_error(x, y), functional.mse_loss(*torch_pair, reduction="none").mean(1).numpy())
    close(losses.absolute_error(x, y), functional.l1_loss(*torch_pair, reduction="none").mean(1).numpy())
    expected = functional.smooth_l1_loss(*torch_pair, beta=width, reduction="none").mean(1).numpy()
    close(losses.smooth_l1(x, y, beta=width), expected)
    expected = functional.huber_loss(*torch_pair, delta=width, reduction="none").mean(1).numpy()
    close(losses.huber(x, y, delta=width), expected)


# regression


def test_smooth_l1_on_both_sides_of_beta():
    targets = jnp.zeros((3, 1))
    predictions = jnp.array([[0.5], [-2.0], [8.0]])
    close(losses.smooth_l1(predictions, targets, beta=2.0), [0.0625, 1.0, 7.0])
    close(losses.huber(predictions, targets, delta=2.0), [0.125, 2.0, 14.0])


@pytest.mark.parametrize("loss", REGRESSION.values(), ids=REGRESSION)
def test_regression_averages_output_dimensions(loss):
    predictions, targets = jnp.array(draw()[0]), jnp.array(draw(seed=3)[0])
    columns = [loss(predictions[:, i], targets[:, i]) for i in range(NUM_CLASSES)]
    close(loss(predictions, targets), np.mean(columns, axis=0))
    deep = predictions.reshape(4, 4, NUM_CLASSES)
    close(loss(deep, targets.reshape(deep.shape)), np.mean(columns, axis=0).reshape(4, 4).mean(axis=1))


@pytest.mark.parametrize("loss", REGRESSION.values(), ids=REGRESSION)
def test_regression_gradient_is_finite_at_zero_and_far_away(loss):
    predictions = jnp.array([[0.0], [1.0], [1e15], [-1e15]])
    gradient = jax.grad(lambda x: loss(x, jnp.zeros((4, 1))).sum())(predictions)
    assert np.isfinite(gradient).all()
    assert gradient[0] == 0
    assert gradient[2] > 0 > gradient[3]


@pytest.mark.parametrize("loss", REGRESSION.values(), ids=REGRESSION)
def test_regression_computes_in_float32(loss):
    predictions = jnp.array([[256.0, 1.0]], jnp.bfloat16)
    result = loss(predictions, jnp.array([[255, 0]], jnp.int32))
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, loss(predictions.astype(jnp.float32), jnp.array([[255.0, 0.0]])))


# messages


@pytest.mark.parametrize(
    "labels",
    [
        np.zeros((16, 1), np.int32),
        np.zeros(16, np.float32),
        np.zeros(1, np.int32),
        np.zeros((16, 6), np.float32),
    ],
    ids=["column", "float indices", "other batch", "other classes"],
)
def test_labels_that_do_not_fit_are_named(labels):
    message = rf"labels have shape \({labels.shape[0]},.*{labels.dtype}.*\(16, 7\).*indices of shape \(16,\)"
    with pytest.raises(ValueError, match=message):
        losses.label_rows(jnp.array(labels), (16, NUM_CLASSES))


@every_classification_loss
def test_every_loss_refuses_labels_that_would_broadcast(loss):
    with pytest.raises(ValueError, match=r"labels have shape \(16, 1\)"):
        loss(jnp.array(draw()[0]), jnp.zeros((16, 1), jnp.int32))


@pytest.mark.parametrize("loss", [losses.softmax_cross_entropy, losses.sigmoid_cross_entropy])
def test_option_errors_name_value_and_range(loss):
    logits, labels = map(jnp.array, draw())
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.0; expected a value in \[0, 1\)"):
        loss(logits, labels, label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"label_smoothing is -0\.1"):
        loss(logits, labels, label_smoothing=-0.1)


def test_focal_option_errors_name_value_and_range():
    logits, labels = map(jnp.array, draw())
    with pytest.raises(ValueError, match=r"gamma is -1\.0; expected 0"):
        losses.softmax_focal(logits, labels, gamma=-1.0)
    with pytest.raises(ValueError, match=r"gamma is -1\.0; expected 0"):
        losses.sigmoid_focal(logits, labels, gamma=-1.0)
    with pytest.raises(ValueError, match=r"alpha is 2\.0; expected a value in 0\.\.1"):
        losses.sigmoid_focal(logits, labels, alpha=2.0)


@pytest.mark.parametrize("loss", REGRESSION.values(), ids=REGRESSION)
def test_regression_does_not_broadcast(loss):
    with pytest.raises(ValueError, match=r"predictions have shape \(4, 1\) and targets \(4,\)"):
        loss(jnp.zeros((4, 1)), jnp.zeros(4))


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan")])
def test_huber_width_must_be_positive(width):
    with pytest.raises(ValueError, match="expected a positive number"):
        losses.huber(jnp.zeros((2, 1)), jnp.zeros((2, 1)), delta=width)


# reduction


def test_weighted_mean_is_the_mean_over_weight():
    values, weights = jnp.array([1.0, 2.0, 5.0]), jnp.array([1.0, 0.5, 0.0])
    assert losses.weighted_mean(values, weights) == pytest.approx(2.0 / 1.5)
    assert losses.weighted_sums(values, weights) == (2.0, 1.5)


def test_tiny_weights_are_not_rounded_up():
    assert losses.weighted_mean(jnp.array([3.0]), jnp.array([1e-20])) == pytest.approx(3.0)


def test_batch_without_weight_has_loss_and_gradient_zero():
    value, gradient = jax.value_and_grad(losses.weighted_mean)(jnp.array([jnp.nan, 1.0]), jnp.zeros(2))
    assert value == 0
    assert (np.asarray(gradient) == 0).all()


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_padded_values_add_exactly_nothing(junk):
    values, weights = jnp.array([0.1, 0.7, 0.3]), jnp.ones(3)
    padded = jnp.concatenate([values, jnp.full(2, junk)]), jnp.array([1.0, 1, 1, 0, 0])
    clean = jax.value_and_grad(losses.weighted_mean)(values, weights)
    value, gradient = jax.value_and_grad(losses.weighted_mean)(*padded)
    assert value == clean[0]
    np.testing.assert_array_equal(gradient, np.append(clean[1], [0, 0]))


def test_counted_nan_is_not_hidden():
    assert np.isnan(losses.weighted_mean(jnp.array([jnp.nan, 1.0]), jnp.ones(2)))


@every_classification_loss
def test_masked_logits_give_clean_gradients(loss):
    logits, labels = draw(8)
    logits[5:], labels[5:] = np.nan, -1
    weights = jnp.array([1.0] * 5 + [0.0] * 3)

    def objective(x, y, w):
        return losses.weighted_mean(loss(losses.mask_rows(x, w), y), w)

    value, gradient = jax.value_and_grad(objective)(jnp.array(logits), jnp.array(labels), weights)
    short = jax.value_and_grad(objective)(jnp.array(logits[:5]), jnp.array(labels[:5]), weights[:5])
    close(value, short[0])
    close(gradient, np.concatenate([short[1], np.zeros((3, NUM_CLASSES))]))


# devices


def mesh(**axes):
    if len(jax.devices()) < 8:
        pytest.fail("these tests need 8 devices: set jax_num_cpu_devices=8 before jax starts (tests/conftest.py)")
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def uneven_batch():
    """Sixteen rows, two per device of eight, of which two, one or none are real; NaN in the padding."""
    logits, labels = draw(16)
    weights = np.array([1, 1, 1, 0, 0, 0, 0.5, 1, 1, 0, 0, 1, 1, 1, 0, 0], np.float32)
    logits[weights == 0], labels[weights == 0] = np.nan, -1
    return jnp.array(logits), jnp.array(labels), jnp.array(weights)


def linear_loss(kernel, logits, labels, weights, axis_names=("data", "fsdp")):
    outputs = losses.mask_rows(logits, weights) @ kernel
    return losses.weighted_mean(losses.softmax_cross_entropy(outputs, labels), weights, axis_names)


@pytest.mark.parametrize(
    "axes", [{"data": 8}, {"data": 4, "fsdp": 2}, {"data": 4, "model": 2}, {"data": 1, "model": 8}]
)
def test_loss_and_gradient_do_not_depend_on_the_devices(axes):
    batch = uneven_batch()
    kernel = jnp.eye(NUM_CLASSES) + 0.1 * jnp.array(draw(NUM_CLASSES)[0])
    split = P(tuple(axis for axis in axes if axis != "model"))
    step = jax.shard_map(
        jax.value_and_grad(linear_loss), mesh=mesh(**axes), in_specs=(P(), split, split, split), out_specs=P()
    )
    value, gradient = jax.jit(step)(kernel, *batch)
    expected = jax.value_and_grad(linear_loss)(kernel, *batch)
    assert np.isfinite(value)
    close(value, expected[0])
    close(gradient, expected[1])


def test_empty_axis_names_stay_local():
    def local(values):
        return losses.weighted_mean(values, jnp.ones_like(values), axis_names=())[None]

    split = jax.shard_map(local, mesh=mesh(data=8), in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(split(jnp.arange(16.0)), np.arange(16.0).reshape(8, 2).mean(axis=1))


def test_weights_made_on_the_device_count_on_every_device():
    def sums(values):
        return losses.weighted_sums(values, jnp.ones(values.shape), axis_names=("data",))

    total, weight = jax.shard_map(sums, mesh=mesh(data=8), in_specs=P("data"), out_specs=P())(jnp.arange(16.0))
    assert (total, weight) == (120.0, 16.0)


def test_untracked_shard_map_is_refused():
    def mean(values):
        return losses.weighted_mean(values, jnp.ones_like(values), axis_names=("data",))

    untracked = jax.shard_map(mean, mesh=mesh(data=8), in_specs=P("data"), out_specs=P(), check_vma=False)
    with pytest.raises(ValueError, match=r"mesh axis 'data' has several devices.*check_vma=True"):
        untracked(jnp.arange(16.0))
