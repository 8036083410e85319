"""Losses over pixels equal their numpy forms; void pixels, padding and the split of a batch change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.losses import (
    SegmentationLossConfig,
    lovasz_softmax,
    rebalanced_weights,
    segmentation_counts,
    segmentation_loss,
)
from eqvision.types import IGNORE_LABEL

ALL = SegmentationLossConfig(
    cross_entropy=1.0, focal=0.5, dice=2.0, lovasz=0.7, focal_gamma=1.5, class_weights=(0.5, 1.0, 3.0, 1.5)
)
SHAPE = (3, 5, 6)


def drawn(seed=0, shape=SHAPE, k=4):
    rng = np.random.default_rng(seed)
    logits = (2 * rng.normal(size=(*shape, k))).astype(np.float32)
    labels = rng.integers(0, k, shape).astype(np.int32)
    labels[rng.random(shape) < 0.2] = IGNORE_LABEL
    labels[0][labels[0] == 2] = 1  # a class that one image has not
    return logits, labels, np.ones(shape[0], np.float32)


def softmax(logits):
    e = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def numpy_pixels(logits, labels, config, gamma):
    """Weighted mean of -(1 - p)^gamma log p over the labelled pixels."""
    kept = labels != IGNORE_LABEL
    p = np.take_along_axis(softmax(logits[kept]), labels[kept][:, None], axis=-1)[:, 0]
    weights = np.array(config.class_weights)[labels[kept]]
    return ((1 - p) ** gamma * -np.log(p) * weights).sum() / weights.sum()


def numpy_dice(logits, labels):
    kept = labels != IGNORE_LABEL
    p, true = softmax(logits)[kept], labels[kept]
    values = []
    for k in np.unique(true):
        t = true == k
        values.append(1 - (2 * p[t, k].sum() + 1) / (p[:, k].sum() + t.sum() + 1))
    return np.mean(values)


def numpy_lovasz(logits, labels):
    """By its definition: the extension of the Jaccard loss, one pixel after the other (Berman et al. 2018, eq. 9)."""
    kept = labels != IGNORE_LABEL
    p, true = softmax(logits)[kept], labels[kept]
    values = []
    for k in np.unique(true):
        t = true == k
        errors = np.where(t, 1 - p[:, k], p[:, k])
        value, before, wrong = 0.0, 0.0, np.zeros(len(t), bool)
        for i in np.argsort(-errors):
            wrong[i] = True
            jaccard = 1 - (t & ~wrong).sum() / (t | wrong).sum()
            value, before = value + errors[i] * (jaccard - before), jaccard
        values.append(value)
    return np.mean(values)


@jax.jit
def counts_of(labels, weights):
    return segmentation_counts(labels, weights, ALL)


@functools.partial(jax.jit, static_argnames="config")
def loss_and_gradient(logits, labels, weights, counts, config=ALL):
    """Loss, terms and gradient; nearly all tests share this one compilation."""
    function = jax.value_and_grad(lambda x: segmentation_loss(x, labels, weights, counts, config), has_aux=True)
    (value, terms), gradient = function(logits)
    return value, terms, gradient


def loss_of(logits, labels, weights):
    return loss_and_gradient(logits, labels, weights, counts_of(labels, weights))


def test_terms_equal_their_numpy_forms():
    logits, labels, weights = drawn()
    total, terms, _ = loss_of(logits, labels, weights)
    expected = {
        "cross_entropy": numpy_pixels(logits, labels, ALL, 0),
        "focal": numpy_pixels(logits, labels, ALL, ALL.focal_gamma),
        "dice": np.mean([numpy_dice(*pair) for pair in zip(logits, labels, strict=True)]),
        "lovasz": np.mean([numpy_lovasz(*pair) for pair in zip(logits, labels, strict=True)]),
    }
    assert set(terms) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(total, sum(getattr(ALL, name) * expected[name] for name in expected), rtol=2e-5)


def test_terms_of_factor_0_are_left_out():
    logits, labels, weights = drawn()
    config = SegmentationLossConfig(cross_entropy=0.0, dice=1.0)
    counts = jax.eval_shape(segmentation_counts, labels, weights)
    _, terms = jax.eval_shape(functools.partial(segmentation_loss, config=config), logits, labels, weights, counts)
    assert set(terms) == {"dice"}


def test_void_pixels_and_padded_rows_may_hold_nan():
    logits, labels, weights = drawn()
    weights[2] = 0
    spoilt = np.where((labels == IGNORE_LABEL)[..., None], np.nan, logits)
    spoilt[2] = np.nan
    junk = labels.copy()
    junk[2] = 77  # no class
    counts = counts_of(labels, weights)
    assert list(map(float, counts)) == list(map(float, counts_of(junk, weights)))
    value, _, gradient = loss_and_gradient(logits, labels, weights, counts)
    other, _, spoilt_gradient = loss_and_gradient(spoilt, junk, weights, counts)
    assert value == other
    np.testing.assert_array_equal(gradient, spoilt_gradient)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[labels == IGNORE_LABEL] == 0).all()
    assert np.abs(np.asarray(gradient)[:2]).max() > 0


def test_shares_of_a_split_batch_add_up():
    """Each device sees the other's images as rows of weight 0."""
    logits, labels, weights = drawn(1)
    split = [np.array([1, 0, 0], np.float32), np.array([0, 1, 1], np.float32)]
    whole, parts = counts_of(labels, weights), [counts_of(labels, mine) for mine in split]
    np.testing.assert_allclose(np.add(*map(np.array, parts)), np.array(whole), rtol=1e-6)
    value, _, gradient = loss_and_gradient(logits, labels, weights, whole)
    shares = [loss_and_gradient(logits, labels, mine, whole) for mine in split]
    np.testing.assert_allclose(float(shares[0][0]) + float(shares[1][0]), value, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(shares[0][2]) + np.asarray(shares[1][2]), gradient, atol=1e-7)


@pytest.mark.slow
def test_padding_of_images_changes_nothing():
    logits, labels, weights = drawn()
    wider = [(0, 0), (0, 2), (0, 3)]
    padded = np.pad(labels, wider, constant_values=IGNORE_LABEL)
    more = np.pad(logits, [*wider, (0, 0)], constant_values=9.0)
    np.testing.assert_allclose(loss_of(more, padded, weights)[0], loss_of(logits, labels, weights)[0], rtol=1e-6)


def test_no_labelled_pixel_gives_0_and_no_gradient():
    logits, labels, weights = drawn()
    void = np.full_like(labels, IGNORE_LABEL)
    counts = counts_of(void, weights)
    assert tuple(map(float, counts)) == (0.0, 0.0)
    value, _, gradient = loss_and_gradient(logits, void, weights, counts)
    assert value == 0
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize("label", [4, -1, 254])
def test_a_label_that_is_no_class_makes_the_loss_nan(label):
    logits, labels, weights = drawn()
    labels[1, 2, 3] = label
    value, terms, _ = loss_of(logits, labels, weights)
    assert np.isnan(value)
    assert np.isfinite(terms["dice"])  # which by itself would not have noticed


def test_perfect_logits_cost_nothing():
    _, labels, weights = drawn()
    perfect = 50 * (labels[..., None] == np.arange(4)).astype(np.float32)
    _, terms, _ = loss_of(perfect, labels, weights)
    np.testing.assert_allclose([float(value) for value in terms.values()], 0, atol=1e-6)


def test_weights_in_inverse_proportion_to_pixels():
    assert rebalanced_weights(np.array([10, 30, 60]), 0) == pytest.approx((1, 1, 1))
    weights = rebalanced_weights(np.array([10, 20, 40]))
    assert weights == pytest.approx((12 / 7, 6 / 7, 3 / 7))
    half = rebalanced_weights(np.array([10, 20, 40]), 0.5)
    assert half == pytest.approx([(1 + w) / 2 for w in weights])
    assert rebalanced_weights(np.array([0, 20, 40]))[0] == rebalanced_weights(np.array([20, 20, 40]))[0]
    with pytest.raises(ValueError, match="factor is 2; expected 0"):
        rebalanced_weights(np.array([1, 2]), 2)
    with pytest.raises(ValueError, match="expected a count for each class, one of them above 0"):
        rebalanced_weights(np.array([0, 0]))


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"dice is -1\.0; expected 0 or more"):
        SegmentationLossConfig(dice=-1.0)
    with pytest.raises(ValueError, match="cross_entropy, focal, dice, lovasz are all 0"):
        SegmentationLossConfig(cross_entropy=0.0)
    with pytest.raises(ValueError, match=r"class_weights are \(1.0, 0.0\); expected a positive number"):
        SegmentationLossConfig(class_weights=(1.0, 0.0))
    with pytest.raises(ValueError, match="class_weights has 4 entries, but the logits have 3 classes"):
        loss_of(*drawn(k=3))


@pytest.mark.parity
def test_cross_entropy_and_its_gradient_equal_torch():
    import torch

    logits, labels, weights = drawn(2)
    config = SegmentationLossConfig(class_weights=ALL.class_weights)
    value, _, gradient = loss_and_gradient(logits, labels, weights, counts_of(labels, weights), config=config)
    theirs = torch.tensor(logits).movedim(-1, 1).requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        theirs, torch.tensor(labels).long(), weight=torch.tensor(config.class_weights), ignore_index=IGNORE_LABEL
    )
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.movedim(1, -1).numpy(), atol=1e-6)


@pytest.mark.parity
def test_lovasz_softmax_and_its_gradient_equal_torch():
    """Against the sorted form with torch's own gradient, void pixels removed as the paper's code does."""
    import torch

    logits, labels, _ = drawn(3)

    def reference(x, true):
        p, true = torch.softmax(x[true != IGNORE_LABEL], dim=-1), true[true != IGNORE_LABEL]
        values = []
        for k in true.unique():
            inside = (true == k).float()
            errors, order = (inside - p[:, k]).abs().sort(descending=True)
            ranked = inside[order]
            jaccard = 1 - (ranked.sum() - ranked.cumsum(0)) / (ranked.sum() + (1 - ranked).cumsum(0))
            values.append((errors * torch.diff(jaccard, prepend=torch.zeros(1))).sum())
        return torch.stack(values).mean()

    theirs = torch.tensor(logits, requires_grad=True)
    each = torch.stack([reference(x, torch.tensor(t)) for x, t in zip(theirs, labels, strict=True)])
    each.sum().backward()
    value, gradient = jax.value_and_grad(lambda x: lovasz_softmax(x, jnp.array(labels)).sum())(jnp.array(logits))
    np.testing.assert_allclose(value, each.sum().item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-6)
