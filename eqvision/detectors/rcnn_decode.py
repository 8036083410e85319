"""From scores and boxes of proposals to the objects of an image, as R-CNNs do it. All in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eqvision.detectors.rcnn_dialects import RCNNDialect
from eqvision.detectors.rcnn_proposals import boxes_at_least, take_rows
from eqvision.ops.boxes import clip_boxes
from eqvision.ops.nms import nms, select_best
from eqvision.types import Detections


def decode_rcnn(
    scores: Float[Array, "b r classes"],
    boxes: Float[Array, "b r boxes 4"],
    valid: Bool[Array, "b r"],
    size: Int[Array, "b 2"],
    *,
    dialect: RCNNDialect,
    count: int = 100,
    candidates: int = 5000,
) -> Detections:
    """``count`` objects, best first: pairs of proposal and class above a score, without those that a better one of
    their class covers.

    ``scores`` are probabilities without the background, ``boxes`` xyxy, one for each class or one for all. They are
    cut off at ``size``; then those that are too small or not finite fall out.

    Of the pairs above the threshold the ``candidates`` best are looked at. The result is exact where there are no
    more of them, and wherever ``count`` objects are found; else worse pairs than the candidates may be missing.
    """
    b, r, classes = scores.shape
    boxes = jnp.broadcast_to(clip_boxes(boxes.reshape(b, -1, 4), size).reshape(boxes.shape), (b, r, classes, 4))
    usable = valid[..., None] & (scores > dialect.score_threshold) & jnp.all(jnp.isfinite(boxes), axis=-1)
    usable &= boxes_at_least(boxes, dialect.smallest_box, strict=False) if dialect.smallest_box else True
    chosen = select_best(usable.reshape(b, -1), scores.reshape(b, -1), min(candidates, r * classes))
    scores, boxes = (take_rows(x.reshape(b, r * classes, *x.shape[3:]), chosen.indices) for x in (scores, boxes))
    labels = chosen.indices % classes
    limits = {"threshold": dialect.overlap, "max_kept": count, "class_rule": dialect.class_rule}
    kept = nms(boxes, scores, labels=labels, valid=chosen.valid, **limits)
    best = select_best(kept, scores, count)
    boxes, scores, labels = (take_rows(x, best.indices) for x in (boxes, scores, labels))
    found = best.valid
    return Detections(
        jnp.where(found[..., None], boxes, 0.0), jnp.where(found, scores, 0.0), jnp.where(found, labels, 0), found
    )


def scale_detections(found: Detections, size: Int[Array, "b 2"], original_size: Int[Array, "b 2"]) -> Detections:
    """Boxes in pixels of images of ``original_size`` and not ``size`` (height, width); masks, being in boxes, stay."""
    factor = original_size.astype(jnp.float32) / jnp.maximum(size, 1).astype(jnp.float32)
    return found._replace(boxes=found.boxes * jnp.tile(factor[:, ::-1], 2)[:, None])
