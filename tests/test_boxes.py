"""Boxes by hand, finite gradients where boxes are empty, and torchvision's formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.losses import box_giou, box_l1
from eqvision.ops import (
    box_area,
    clip_boxes,
    cxcywh_to_xyxy,
    elementwise_ciou,
    elementwise_diou,
    elementwise_giou,
    elementwise_iou,
    pairwise_giou,
    pairwise_iou,
    pairwise_l1,
    xywh_to_xyxy,
    xyxy_to_cxcywh,
    xyxy_to_xywh,
)

ELEMENTWISE = (elementwise_iou, elementwise_giou, elementwise_diou, elementwise_ciou)
UNIT = (0.0, 0.0, 1.0, 1.0)
# What breaks quotients: points, lines, tiny, inverted, touching, equal and contained boxes.
ODD = (
    UNIT,
    (0.5, 0.5, 0.5, 0.5),
    (0.0, 0.0, 0.0, 0.0),
    (0.2, 0.2, 0.2, 0.8),
    (0.3, 0.3, 0.3 + 1e-7, 0.3 + 1e-7),
    (0.0, 0.0, 1e-19, 1e-19),
    (0.9, 0.8, 0.1, 0.2),
    (1.0, 0.0, 2.0, 1.0),
    (0.25, 0.25, 0.75, 0.75),
    (0.0, 0.0, 1333.0, 800.0),
)


def pairs(boxes):
    """Each with each, as two lists."""
    boxes = np.asarray(boxes, np.float32)
    first, second = np.repeat(boxes, len(boxes), axis=0), np.tile(boxes, (len(boxes), 1))
    return jnp.asarray(first), jnp.asarray(second)


def random_boxes(rng, *shape, scale=100.0):
    corners = np.sort(rng.uniform(0, scale, (*shape, 2, 2)), axis=-2)
    return jnp.asarray(corners.reshape(*shape, 4), jnp.float32)


def iou64(a, b):
    """Intersection over union of two boxes, in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(wide, 0) * max(high, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


# Conversions


def test_conversions_by_hand():
    box = jnp.array([[10.0, 20.0, 40.0, 30.0]])
    assert xyxy_to_cxcywh(box).tolist() == [[25, 25, 30, 10]]
    assert xyxy_to_xywh(box).tolist() == [[10, 20, 30, 10]]
    assert cxcywh_to_xyxy(xyxy_to_cxcywh(box)).tolist() == box.tolist()
    assert xywh_to_xyxy(xyxy_to_xywh(box)).tolist() == box.tolist()
    assert box_area(box).tolist() == [300]


def test_conversions_are_float32_for_any_shape():
    boxes = jnp.ones((2, 3, 5, 4), jnp.bfloat16)
    for convert in (cxcywh_to_xyxy, xyxy_to_cxcywh, xywh_to_xyxy, xyxy_to_xywh):
        assert (convert(boxes).shape, convert(boxes).dtype) == (boxes.shape, jnp.float32)


def test_an_inverted_box_has_no_area():
    assert box_area(jnp.array([[4.0, 0, 1, 5], [4, 5, 1, 0], [2, 2, 2, 9]])).tolist() == [0, 0, 0]


def test_clipping_cuts_at_the_border_of_each_image():
    boxes = jnp.array([[[-5.0, -5, 20, 20], [30, 1, 40, 2]], [[-5, -5, 20, 20], [1, 2, 3, 4]]])
    clipped = clip_boxes(boxes, jnp.array([[10, 15], [100, 8]]))
    assert clipped.tolist() == [[[0, 0, 15, 10], [15, 1, 15, 2]], [[0, 0, 8, 20], [1, 2, 3, 4]]]
    assert box_area(clipped)[0, 1] == 0


# Overlaps


def test_generalised_iou_by_hand():
    boxes = jnp.array([(3.0, 0, 4, 1), UNIT, (0.25, 0.25, 0.75, 0.75), (1, 0, 2, 1), (0.5, 0, 1.5, 1)])
    unit = jnp.broadcast_to(jnp.array(UNIT), boxes.shape)
    np.testing.assert_allclose(elementwise_iou(unit, boxes), [0, 1, 0.25, 0, 1 / 3], rtol=1e-6)
    # disjoint: minus the empty share of the hull; contained: the hull is the larger box, so the IoU
    np.testing.assert_allclose(elementwise_giou(unit, boxes), [-0.5, 1, 0.25, 0, 1 / 3], rtol=1e-6)


def test_distance_and_complete_iou_by_hand():
    a, b = jnp.array([UNIT, UNIT]), jnp.array([(3.0, 0, 4, 1), (0, 0, 1, 2)])
    np.testing.assert_allclose(elementwise_diou(a, b), [-9 / 17, 0.5 - 0.25 / 5], rtol=1e-6)
    shape = 4 / np.pi**2 * (np.pi / 4 - np.arctan(0.5)) ** 2
    weight = shape / (0.5 + shape)
    np.testing.assert_allclose(elementwise_ciou(a, b), [-9 / 17, 0.45 - weight * shape], rtol=1e-6)


def test_equal_boxes_overlap_wholly_and_empty_ones_not_at_all():
    box, point = jnp.array([[3.0, 4, 9, 8]]), jnp.array([[3.0, 4, 3, 4]])
    for overlap in ELEMENTWISE:
        np.testing.assert_allclose(overlap(box, box), 1, rtol=1e-6)
        assert overlap(point, point) == 0
    assert elementwise_iou(box, point) == 0
    assert -1 <= elementwise_giou(box, point) <= 0


def test_pairs_are_the_elements(rng):
    a, b = random_boxes(rng, 3, 1, 5), random_boxes(rng, 2, 4)
    wide = jnp.broadcast_to(a[..., None, :], (3, 2, 5, 4, 4)), jnp.broadcast_to(b[:, None], (3, 2, 5, 4, 4))
    np.testing.assert_allclose(pairwise_iou(a, b), elementwise_iou(*wide), rtol=1e-6)
    np.testing.assert_allclose(pairwise_giou(a, b), elementwise_giou(*wide), rtol=1e-6)
    np.testing.assert_allclose(pairwise_l1(a, b), box_l1(*wide), rtol=1e-6)
    expected = iou64(a[2, 0, 3], b[1, 2])
    np.testing.assert_allclose(pairwise_iou(a, b)[2, 1, 3, 2], expected, rtol=1e-5)


def test_no_boxes_give_no_pairs():
    assert pairwise_giou(jnp.zeros((0, 4)), jnp.zeros((3, 4))).shape == (0, 3)


@pytest.mark.parametrize("overlap", ELEMENTWISE)
def test_odd_boxes_have_finite_values_and_gradients(overlap):
    a, b = pairs(ODD)
    value, gradients = jax.jit(jax.value_and_grad(lambda a, b: overlap(a, b).sum(), argnums=(0, 1)))(a, b)
    assert np.isfinite(value)
    assert np.isfinite(gradients[0]).all()
    assert np.isfinite(gradients[1]).all()
    assert np.abs(gradients[0]).max() > 0


def test_overlaps_stay_within_their_ranges(rng):
    a, b = (jnp.concatenate(both) for both in zip(pairs(ODD), pairs(random_boxes(rng, 8)), strict=True))
    iou, giou, diou, ciou = (np.asarray(overlap(a, b)) for overlap in ELEMENTWISE)
    assert (iou >= 0).all()
    assert (iou <= 1 + 1e-6).all()
    assert (giou >= -1 - 1e-6).all()
    assert (giou <= iou + 1e-6).all()
    assert (diou <= iou + 1e-6).all()
    assert (ciou <= diou + 1e-6).all()


def test_boxes_of_different_shapes_are_refused():
    with pytest.raises(Exception, match="b"):
        elementwise_iou(jnp.ones((3, 4)), jnp.ones((1, 4)))


# Losses


def test_box_losses_by_hand():
    a, b = jnp.array([UNIT, UNIT]), jnp.array([(3.0, 0, 4, 1), UNIT])
    assert box_l1(a, b).tolist() == [6, 0]
    assert box_giou(a, b).tolist() == [1.5, 0]


def test_equal_boxes_have_no_l1_gradient():
    box = jnp.array([UNIT])
    assert not jax.grad(lambda a: box_l1(a, box).sum())(box).any()


# torchvision


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "overlap"),
    [("generalized", elementwise_giou), ("distance", elementwise_diou), ("complete", elementwise_ciou)],
)
def test_overlaps_and_gradients_equal_torchvision(rng, assert_close, name, overlap):
    torch = pytest.importorskip("torch")
    import torchvision.ops

    reference = getattr(torchvision.ops, f"{name}_box_iou_loss")
    a, b = random_boxes(rng, 200), random_boxes(rng, 200)
    given = torch.tensor(np.asarray(a), requires_grad=True)
    expected = reference(given, torch.tensor(np.asarray(b)))
    expected.sum().backward()
    value, pull = jax.vjp(lambda a: 1 - overlap(a, b), a)
    assert_close(value, expected.detach().numpy(), 1e-5)
    assert_close(pull(jnp.ones(200))[0], given.grad.numpy(), 1e-5)
