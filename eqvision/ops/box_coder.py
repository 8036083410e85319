"""Boxes as differences from anchors or proposals, as region-based detectors predict them (Girshick et al. 2014)."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from eqvision.ops.boxes import clip_boxes, cxcywh_to_xyxy, xyxy_to_cxcywh

# What differences are multiplied by before they are predicted; for x, y, width and height. mmdet writes the same
# as standard deviations of 1, or of 0.1, 0.1, 0.2, 0.2, to divide by.
RPN_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
ROI_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
CASCADE_WEIGHTS = (ROI_WEIGHTS, (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))

LARGEST_LOG_SCALE = math.log(1000 / 16)  # no box grows by more than 62.5 times, in all three references
SMALLEST_EXTENT = 1e-6  # widths and heights below count as this, so that no logarithm or quotient is infinite

Weights = tuple[float, float, float, float]


def encode_boxes(
    boxes: Float[Array, "... 4"], anchors: Float[Array, "... 4"], *, weights: Weights = RPN_WEIGHTS
) -> Float[Array, "... 4"]:
    """Differences (x, y, width, height) that lead from ``anchors`` to ``boxes``; both xyxy, leading axes broadcast.

    Distances of centres over the anchor's width and height, and logarithms of the ratios of widths and heights, times
    ``weights``. Finite, with finite gradients, for any finite boxes, empty and inverted ones included.
    """
    (x, y, width, height), (at_x, at_y, across, down) = (_centre_and_extent(each) for each in (boxes, anchors))
    moves = (x - at_x) / across, (y - at_y) / down, jnp.log(width / across), jnp.log(height / down)
    return jnp.stack([move * weight for move, weight in zip(moves, weights, strict=True)], axis=-1)


def decode_boxes(
    deltas: Float[Array, "... 4"],
    anchors: Float[Array, "... 4"],
    *,
    weights: Weights = RPN_WEIGHTS,
    largest_log_scale: float = LARGEST_LOG_SCALE,
    clamp_shrinking: bool = False,
) -> Float[Array, "... 4"]:
    """The boxes that differ from ``anchors`` by ``deltas``, in float32.

    Leading axes broadcast: deltas for each class (n, classes, 4) take anchors (n, 1, 4). The logarithms of width and
    height are at most ``largest_log_scale``; where that holds them back they have no gradient. mmdet also keeps them
    above its negative (``clamp_shrinking``); torchvision and detectron2 do not.
    """
    lowest = -largest_log_scale if clamp_shrinking else -jnp.inf
    at_x, at_y, across, down = jnp.moveaxis(xyxy_to_cxcywh(anchors), -1, 0)
    deltas = deltas.astype(jnp.float32) / jnp.asarray(weights, jnp.float32)
    x, y = deltas[..., 0] * across + at_x, deltas[..., 1] * down + at_y
    wider, higher = (jnp.exp(jnp.clip(deltas[..., i], lowest, largest_log_scale)) for i in (2, 3))
    return cxcywh_to_xyxy(jnp.stack([x, y, across * wider, down * higher], axis=-1))


def decode_and_clip(
    deltas: Float[Array, "... n 4"],
    anchors: Float[Array, "... n 4"],
    size: Num[Array, "... 2"],
    *,
    weights: Weights = RPN_WEIGHTS,
    clamp_shrinking: bool = False,
) -> Float[Array, "... n 4"]:
    """``decode_boxes``, then what lies inside images of ``size`` (height, width)."""
    return clip_boxes(decode_boxes(deltas, anchors, weights=weights, clamp_shrinking=clamp_shrinking), size)


def _centre_and_extent(boxes: Float[Array, "... 4"]) -> tuple[Float[Array, "..."], ...]:
    x, y, width, height = jnp.moveaxis(xyxy_to_cxcywh(boxes), -1, 0)
    return x, y, jnp.maximum(width, SMALLEST_EXTENT), jnp.maximum(height, SMALLEST_EXTENT)
