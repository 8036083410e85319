"""Losses of R-CNNs against numbers by hand, and what may change nothing in them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.losses import (
    DETECTRON2_LOSS,
    MMDET_LOSS,
    TORCHVISION_LOSS,
    RCNNLossConfig,
    rcnn_counts,
    rcnn_loss,
    whole_batch,
)
from eqvision.types import AnchorSample, BoxSample, MaskSample, RCNNSamples

JUNK = np.nan


def samples():
    """Two images of three anchors, two boxes and one mask; what is not valid is junk."""
    anchors = AnchorSample(
        logits=np.array([[0.0, 2.0, JUNK], [-1.0, 0.5, 0.0]]),
        deltas=np.array([[[0.5, 0, 0, 0], [9, 9, 9, 9], [JUNK] * 4], [[1, 1, 0, 0], [9] * 4, [9] * 4]]),
        targets=np.array([[[0.0, 0, 0, 0.05], [JUNK] * 4, [JUNK] * 4], [[0, 1, 0, 0], [JUNK] * 4, [0] * 4]]),
        positive=np.array([[True, False, True], [True, False, False]]),
        valid=np.array([[True, True, False], [True, True, True]]),
    )
    boxes = BoxSample(
        logits=np.array([[[0.0, 0, 0], [1.0, 0, 0]], [[0.0, 3, 0], [JUNK] * 3]]),
        deltas=np.array([[[1.0, 0, 0, 0], [9] * 4], [[9] * 4, [JUNK] * 4]]),
        columns=np.array([[2, 0], [0, -1]]),
        targets=np.array([[[0.0, 0, 0, 2], [0] * 4], [[0] * 4, [JUNK] * 4]]),
        positive=np.array([[True, False], [False, True]]),
        valid=np.array([[True, True], [True, False]]),
    )
    masks = MaskSample(
        logits=np.stack([np.zeros((1, 2, 2)), np.full((1, 2, 2), JUNK)]),
        targets=np.stack([np.full((1, 2, 2), 0.25), np.full((1, 2, 2), JUNK)]),
        valid=np.array([[True], [False]]),
    )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else None), (anchors, (boxes,), masks))


@pytest.fixture(scope="module")
def given():
    return RCNNSamples(*samples())


@jax.jit
def torchvision(given, weights):
    return rcnn_loss(given, weights, rcnn_counts(given, weights))


def smooth(distance, beta=1 / 9):
    return distance**2 / (2 * beta) if distance < beta else distance - beta / 2


def softplus(x):
    return math.log1p(math.exp(x))


def test_torchvisions_by_hand(given, assert_close):
    loss, terms = torchvision(given, jnp.ones(2))
    classes = math.log(3) + (math.log(math.e + 2) - 1) + math.log(2 + math.e**3)
    expected = {
        "objectness": (softplus(0) + softplus(2) + softplus(-1) + 1 + softplus(0.5) + softplus(0)) / 5,
        "proposal": (smooth(0.5) + smooth(0.05) + smooth(1)) / 5,
        "class": classes / 3,
        "box": (smooth(1) + smooth(2)) / 3,
        "mask": math.log(2),
    }
    assert_close(terms, expected, 1e-6)
    assert_close(loss, sum(expected.values()), 1e-6)


def test_the_other_dialects_have_l1_and_their_own_divisor(given, assert_close):
    @jax.jit
    def both(given):
        weights = jnp.ones(2)
        counts = rcnn_counts(given, weights)
        return [rcnn_loss(given, weights, counts, config)[1] for config in (DETECTRON2_LOSS, MMDET_LOSS)]

    detectron2, mmdet = both(given)
    assert_close([detectron2["proposal"], mmdet["proposal"]], [1.55 / 512, 1.55 / 5], 1e-6)
    assert_close([detectron2["box"], mmdet["box"]], [1.0, 1.0], 1e-6)
    objectness = torchvision(given, jnp.ones(2))[1]["objectness"]
    assert_close([detectron2["objectness"], mmdet["objectness"]], [objectness * 5 / 512, objectness], 1e-6)


def test_shares_of_two_devices_add_up(given, assert_close):
    whole, terms = torchvision(given, jnp.ones(2))

    @jax.jit
    def share(given, counts):
        return rcnn_loss(given, jnp.ones(1), counts)

    halves = [jax.tree.map(lambda x, i=i: x[i : i + 1], given) for i in range(2)]
    counts = jax.tree.map(lambda *x: sum(x), *(rcnn_counts(half, jnp.ones(1)) for half in halves))
    assert [float(x) for x in jax.tree.leaves(counts)] == [2, 5, 3, 1]
    first, second = (share(half, counts) for half in halves)
    assert_close(jax.tree.map(jnp.add, first, second), (whole, terms), 1e-6)


def test_a_part_of_an_accumulated_batch_counts_by_its_images(given, assert_close):
    counts = rcnn_counts(given, jnp.ones(2))
    assert_close(whole_batch(counts, jnp.float32(2)), counts, 0)
    loss, _ = jax.jit(lambda g, c: rcnn_loss(g, jnp.ones(2), c))(given, whole_batch(counts, jnp.float32(8)))
    assert_close(loss, torchvision(given, jnp.ones(2))[0] / 4, 1e-6)


def test_junk_has_no_gradient_and_images_of_weight_0_count_for_nothing(given, assert_close):
    @jax.jit
    def gradients(given, weights):
        fixed = jax.tree.map(lambda x: x, given)

        def loss(logits, deltas):
            anchors = fixed.anchors._replace(logits=logits, deltas=deltas)
            new = fixed._replace(anchors=anchors)
            return rcnn_loss(new, weights, rcnn_counts(new, weights))[0]

        return jax.value_and_grad(loss, argnums=(0, 1))(given.anchors.logits, given.anchors.deltas)

    _, (logits, deltas) = gradients(given, jnp.ones(2))
    assert np.isfinite(logits).all()
    assert np.isfinite(deltas).all()
    assert logits[0, 2] == 0
    assert (deltas[0, 1:] == 0).all()
    assert (np.asarray(logits)[given.anchors.valid] != 0).all()
    alone = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), given)
    padded, (logits, deltas) = gradients(given, jnp.array([1.0, 0.0]))
    assert_close(padded, torchvision(alone, jnp.ones(2))[0], 1e-6)
    assert (logits[1] == 0).all()
    assert (deltas[1] == 0).all()
    nothing, (logits, deltas) = gradients(given, jnp.zeros(2))
    assert nothing == 0
    assert (logits == 0).all()
    assert (deltas == 0).all()


def test_a_label_that_is_no_class_is_not_learned_in_silence(given):
    boxes = given.boxes[0]._replace(columns=jnp.array([[-1, 0], [0, 0]]))
    loss, terms = torchvision(given._replace(boxes=(boxes,)), jnp.ones(2))
    assert jnp.isnan(loss)
    assert jnp.isnan(terms["class"])
    assert jnp.isfinite(terms["box"])


def test_stages_before_the_last_are_numbered_and_factors_hold(given, assert_close):
    config = dataclasses.replace(TORCHVISION_LOSS, class_weight=2.0, box_weight=0.0, mask_weight=0.5)

    @jax.jit
    def loss(given):
        return rcnn_loss(given, jnp.ones(2), rcnn_counts(given, jnp.ones(2)), config)

    total, terms = loss(given._replace(boxes=given.boxes * 3))
    assert set(terms) == {"objectness", "proposal", "class_0", "class_1", "class", "box_0", "box_1", "box", "mask"}
    assert_close(total, terms["objectness"] + terms["proposal"] + 6 * terms["class"] + terms["mask"] / 2, 1e-6)


def test_a_negative_factor_is_refused():
    with pytest.raises(ValueError, match=r"mask_weight is -1.0; expected 0 or more."):
        RCNNLossConfig(mask_weight=-1.0)
