"""Boxes: conversions, areas and overlaps, in float32 whatever the input dtype.

A box is ``xyxy``: left, top, right, bottom, in pixels with y downwards, unless the name says otherwise. A box whose
right is not right of its left, or whose bottom is not below its top, is empty: its area and its overlaps are 0. All
values are finite, and so are all gradients, for empty, touching and equal boxes of finite coordinates.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

# Areas below count as none: the gradient of a quotient holds the square of 1 / area, which must stay a float32.
SMALLEST_AREA = 1e-16


def cxcywh_to_xyxy(boxes_cxcywh: Float[Array, "... 4"]) -> Float[Array, "... 4"]:
    """Corners of boxes given as centre, width and height."""
    x, y, width, height = _columns(boxes_cxcywh)
    return jnp.stack([x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height], axis=-1)


def xyxy_to_cxcywh(boxes: Float[Array, "... 4"]) -> Float[Array, "... 4"]:
    """Centre, width and height."""
    left, top, right, bottom = _columns(boxes)
    return jnp.stack([0.5 * (left + right), 0.5 * (top + bottom), right - left, bottom - top], axis=-1)


def xywh_to_xyxy(boxes_xywh: Float[Array, "... 4"]) -> Float[Array, "... 4"]:
    """Corners of boxes given as left, top, width and height, which is how COCO files write them."""
    left, top, width, height = _columns(boxes_xywh)
    return jnp.stack([left, top, left + width, top + height], axis=-1)


def xyxy_to_xywh(boxes: Float[Array, "... 4"]) -> Float[Array, "... 4"]:
    """Left, top, width and height."""
    left, top, right, bottom = _columns(boxes)
    return jnp.stack([left, top, right - left, bottom - top], axis=-1)


def box_area(boxes: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Width times height, in square pixels; 0 for empty boxes."""
    return _area(_columns(boxes))


def clip_boxes(boxes: Float[Array, "... n 4"], size: Num[Array, "... 2"]) -> Float[Array, "... n 4"]:
    """Boxes cut off at the borders of images of ``size`` (height, width); what lies outside becomes empty."""
    height, width = (size.astype(jnp.float32)[..., i, None] for i in range(2))
    left, top, right, bottom = _columns(boxes)
    cut = (jnp.clip(x, 0.0, limit) for x, limit in ((left, width), (top, height), (right, width), (bottom, height)))
    return jnp.stack(list(cut), axis=-1)


def elementwise_iou(a: Float[Array, "*n 4"], b: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Intersection over union, in [0, 1]."""
    return _iou(_columns(a), _columns(b))[0]


def elementwise_giou(a: Float[Array, "*n 4"], b: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Generalised IoU, in [-1, 1] (Rezatofighi et al. 2019): less the share of the hull that neither box covers."""
    return _giou(_columns(a), _columns(b))


def elementwise_diou(a: Float[Array, "*n 4"], b: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Distance IoU (Zheng et al. 2020): less the squared distance of centres over the squared diagonal of the hull."""
    return _diou(_columns(a), _columns(b))


def elementwise_ciou(a: Float[Array, "*n 4"], b: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Complete IoU (Zheng et al. 2020): distance IoU less a penalty for different aspect ratios.

    As in the paper, no gradient flows through the weight of that penalty. An empty box without extent at all counts
    as a square.
    """
    first, second = _columns(a), _columns(b)
    penalty = (4 / jnp.pi**2) * jnp.square(_angle(first) - _angle(second))
    weight = lax.stop_gradient(_ratio(penalty, 1 - _iou(first, second)[0] + penalty))
    return _diou(first, second) - weight * penalty


def pairwise_iou(a: Float[Array, "... n 4"], b: Float[Array, "... m 4"]) -> Float[Array, "... n m"]:
    """Intersection over union of each of ``a`` with each of ``b``; the axes in front are broadcast."""
    return _iou(*_pairs(a, b))[0]


def pairwise_giou(a: Float[Array, "... n 4"], b: Float[Array, "... m 4"]) -> Float[Array, "... n m"]:
    """Generalised IoU of each of ``a`` with each of ``b``; the axes in front are broadcast."""
    return _giou(*_pairs(a, b))


def pairwise_l1(a: Float[Array, "... n 4"], b: Float[Array, "... m 4"]) -> Float[Array, "... n m"]:
    """Sum of the four absolute differences of each of ``a`` and each of ``b``; the axes in front are broadcast."""
    first, *others = (jnp.abs(x - y) for x, y in zip(*_pairs(a, b), strict=True))
    return sum(others, first)


class _Box(NamedTuple):
    """The four numbers apart, so that no array has a last axis of 4, which is slow."""

    left: Float[Array, "..."]
    top: Float[Array, "..."]
    right: Float[Array, "..."]
    bottom: Float[Array, "..."]


def _columns(boxes: Float[Array, "... 4"]) -> _Box:
    boxes = boxes.astype(jnp.float32)
    return _Box(boxes[..., 0], boxes[..., 1], boxes[..., 2], boxes[..., 3])


def _pairs(a: Float[Array, "... n 4"], b: Float[Array, "... m 4"]) -> tuple[_Box, _Box]:
    return _columns(a[..., :, None, :]), _columns(b[..., None, :, :])


def _extent(box: _Box) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    return jnp.maximum(box.right - box.left, 0.0), jnp.maximum(box.bottom - box.top, 0.0)


def _area(box: _Box) -> Float[Array, "..."]:
    width, height = _extent(box)
    return width * height


def _common(a: _Box, b: _Box) -> _Box:
    near, far = jnp.maximum, jnp.minimum
    return _Box(near(a.left, b.left), near(a.top, b.top), far(a.right, b.right), far(a.bottom, b.bottom))


def _hull(a: _Box, b: _Box) -> _Box:
    near, far = jnp.minimum, jnp.maximum
    return _Box(near(a.left, b.left), near(a.top, b.top), far(a.right, b.right), far(a.bottom, b.bottom))


def _iou(a: _Box, b: _Box) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Intersection over union, and the union."""
    intersection = _area(_common(a, b))
    union = _area(a) + _area(b) - intersection
    return _ratio(intersection, union), union


def _giou(a: _Box, b: _Box) -> Float[Array, "..."]:
    iou, union = _iou(a, b)
    hull = _area(_hull(a, b))
    return iou - _ratio(hull - union, hull)


def _diou(a: _Box, b: _Box) -> Float[Array, "..."]:
    width, height = _extent(_hull(a, b))
    across, down = (a.left + a.right - b.left - b.right) / 2, (a.top + a.bottom - b.top - b.bottom) / 2
    return _iou(a, b)[0] - _ratio(across**2 + down**2, width**2 + height**2)


def _angle(box: _Box) -> Float[Array, "..."]:
    """Arc tangent of width over height, with gradient 0 where there is neither."""
    width, height = _extent(box)
    some = width**2 + height**2 > SMALLEST_AREA
    return jnp.arctan2(jnp.where(some, width, 1.0), jnp.where(some, height, 1.0))


def _ratio(part: Float[Array, "..."], whole: Float[Array, "..."]) -> Float[Array, "..."]:
    """0 where the whole is 0; the inner ``where`` keeps 0 / 0 out of the gradient too."""
    some = whole > SMALLEST_AREA
    return jnp.where(some, part / jnp.where(some, whole, 1.0), 0.0)
