"""Differences from anchors by hand, round trips, clamps, and gradients that stay finite."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.ops import (
    CASCADE_WEIGHTS,
    LARGEST_LOG_SCALE,
    ROI_WEIGHTS,
    RPN_WEIGHTS,
    decode_and_clip,
    decode_boxes,
    encode_boxes,
)

ANCHOR = jnp.array([[10.0, 20.0, 30.0, 60.0]])  # 20 wide, 40 high, around (20, 40)


def random_boxes(rng, n):
    low = rng.uniform(-200, 800, (n, 2))
    return jnp.asarray(np.concatenate([low, low + rng.uniform(1, 400, (n, 2))], -1), jnp.float32)


def test_encode_by_hand():
    box = jnp.array([[15.0, 20.0, 55.0, 40.0]])  # 40 wide, 20 high, around (35, 30)
    moves = np.array([15 / 20, -10 / 40, math.log(2), -math.log(2)])
    np.testing.assert_allclose(encode_boxes(box, ANCHOR)[0], moves, rtol=1e-6)
    np.testing.assert_allclose(encode_boxes(box, ANCHOR, weights=ROI_WEIGHTS)[0], moves * [10, 10, 5, 5], rtol=1e-6)
    # mmdet: over standard deviations
    deviations = np.array([0.1, 0.1, 0.2, 0.2])
    np.testing.assert_allclose(encode_boxes(box, ANCHOR, weights=ROI_WEIGHTS)[0], moves / deviations, rtol=1e-6)


def test_nothing_to_correct_is_zero():
    assert encode_boxes(ANCHOR, ANCHOR).tolist() == [[0, 0, 0, 0]]
    assert decode_boxes(jnp.zeros((1, 4)), ANCHOR).tolist() == ANCHOR.tolist()


@pytest.mark.parametrize("weights", [RPN_WEIGHTS, *CASCADE_WEIGHTS])
def test_round_trip(rng, assert_close, weights):
    boxes, anchors = random_boxes(rng, 40), random_boxes(rng, 40)
    deltas = encode_boxes(boxes, anchors, weights=weights)
    no_clamp = decode_boxes(deltas, anchors, weights=weights, largest_log_scale=10.0)
    assert_close(no_clamp, boxes, 1e-5)


def test_boxes_grow_to_at_most_62_and_a_half_times():
    assert pytest.approx(62.5) == math.exp(LARGEST_LOG_SCALE)
    huge = decode_boxes(jnp.array([[0.0, 0.0, 100.0, jnp.log(62.4)]]), ANCHOR)[0]
    np.testing.assert_allclose(huge, [20 - 625, 40 - 1248, 20 + 625, 40 + 1248], rtol=1e-5)


def test_only_mmdet_bounds_how_far_boxes_shrink():
    deltas = jnp.array([[0.0, 0.0, -100.0, -100.0]])
    assert decode_boxes(deltas, ANCHOR)[0].tolist() == [20, 40, 20, 40]
    size = np.diff(decode_boxes(deltas, ANCHOR, clamp_shrinking=True)[0].reshape(2, 2), axis=0)[0]
    np.testing.assert_allclose(size, [20 / 62.5, 40 / 62.5], rtol=1e-4)


def test_deltas_of_every_class_share_the_proposal():
    deltas = jnp.stack([jnp.zeros((1, 4)), jnp.full((1, 4), 10.0)], axis=1)
    boxes = decode_boxes(deltas, ANCHOR[:, None], weights=ROI_WEIGHTS)
    assert boxes.shape == (1, 2, 4)
    assert boxes[0, 0].tolist() == ANCHOR[0].tolist()
    assert boxes[0, 1].mean() == pytest.approx((40 + 80) / 2)  # moved by its own width and height


def test_decoded_then_clipped():
    deltas = jnp.zeros((2, 1, 4)).at[:, :, 0].set(-1.0)  # 20 to the left: 10 pixels outside
    boxes = decode_and_clip(deltas, jnp.stack([ANCHOR, ANCHOR + 100]), jnp.array([[50, 100], [150, 100]]))
    assert boxes.tolist() == [[[0, 20, 10, 50]], [[90, 120, 100, 150]]]


def test_half_precision_is_decoded_in_float32():
    boxes = decode_boxes(jnp.zeros((1, 4), jnp.bfloat16), ANCHOR + 1000.5)
    assert boxes.dtype == jnp.float32
    assert boxes.tolist() == (ANCHOR + 1000.5).tolist()


ODD = ((0.0, 0, 0, 0), (5.0, 5, 5, 9), (9.0, 9, 1, 1), (3.0, 3, 3, 3), (0.0, 0, 1e-20, 1e-20), (0.0, 0, 1e4, 1e4))


def test_empty_boxes_give_finite_differences_and_gradients():
    first, second = (jnp.array(x, jnp.float32) for x in zip(*((a, b) for a in ODD for b in ODD), strict=True))
    assert jnp.isfinite(jax.jit(encode_boxes)(first, second)).all()

    def total(boxes, anchors):
        return jnp.sum(encode_boxes(boxes, anchors))

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(first, second):
        assert jnp.isfinite(gradient).all()


def test_gradients_of_decoding_are_finite_at_any_output():
    deltas = jnp.array([[0.0, 0, 0, 0], [1e4, -1e4, 1e4, -1e4], [0, 0, LARGEST_LOG_SCALE, 300]])
    anchors = jnp.tile(ANCHOR, (3, 1))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(decode_boxes(x, anchors) ** 2)))(deltas)
    assert jnp.isfinite(gradient).all()
    assert gradient[1, 2] == 0  # held back: no gradient
    assert gradient[0, 2] != 0
