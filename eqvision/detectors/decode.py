"""From what detection heads say to objects in pixels. All in float32; nothing is clipped, nothing suppressed."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from eqvision.ops.boxes import cxcywh_to_xyxy
from eqvision.types import Detections, SetPredictions


def decode_softmax(predictions: SetPredictions, size: Int[Array, "b 2"]) -> Detections:
    """DETR's way: every query is one object of its most probable class, no object aside. Best first.

    ``size`` is height and width, per image, of what the boxes shall be in: the original image for evaluation.
    """
    logits = predictions.logits[-1].astype(jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)[..., :-1]
    scores, order = lax.top_k(jnp.max(probabilities, axis=-1), logits.shape[1])
    labels = jnp.take_along_axis(jnp.argmax(probabilities, axis=-1), order, axis=1)
    return _detections(predictions, size, scores, labels, order)


def decode_sigmoid(predictions: SetPredictions, size: Int[Array, "b 2"], count: int = 100) -> Detections:
    """Deformable DETR's way: the ``count`` best pairs of query and class, so that a query may appear twice.

    ``size`` as in ``decode_softmax``.
    """
    logits = predictions.logits[-1].astype(jnp.float32)
    b, q, k = logits.shape
    scores, order = lax.top_k(jax.nn.sigmoid(logits).reshape(b, q * k), min(count, q * k))
    return _detections(predictions, size, scores, order % k, order // k)


def _detections(
    predictions: SetPredictions,
    size: Int[Array, "b 2"],
    scores: Float[Array, "b n"],
    labels: Int[Array, "b n"],
    queries: Int[Array, "b n"],
) -> Detections:
    boxes = scale_boxes(predictions.boxes_cxcywh[-1], size)
    boxes = jnp.take_along_axis(boxes, queries[..., None], axis=1)
    masks = predictions.masks
    masks = None if masks is None else jnp.take_along_axis(masks, queries[..., None, None], axis=1)
    return Detections(boxes, scores, labels.astype(jnp.int32), jnp.ones(scores.shape, bool), masks)


def scale_boxes(boxes_cxcywh: Float[Array, "b n 4"], size: Num[Array, "b 2"]) -> Float[Array, "b n 4"]:
    """xyxy in pixels of images of ``size`` (height, width), from cxcywh in [0, 1]."""
    extent = jnp.tile(size[:, ::-1], 2).astype(jnp.float32)
    return cxcywh_to_xyxy(boxes_cxcywh.astype(jnp.float32)) * extent[:, None]
