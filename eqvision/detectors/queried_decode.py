"""From what an open-vocabulary detector says to objects in pixels."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from eqvision.detectors.decode import scale_boxes
from eqvision.heads.open_vocabulary import NOT_ASKED
from eqvision.ops.nms import nms, select_best
from eqvision.types import Detections, QueriedPredictions


def batch_extent(
    canvas: tuple[int, ...], size: Int[Array, "b 2"], original_size: Int[Array, "b 2"]
) -> Float[Array, "b 2"]:
    """Height and width of the whole image of the batch, which has those of ``canvas``, in pixels of the originals.

    ``size`` is what of the canvas is image. Boxes in [0, 1] of the canvas are in original pixels when they are
    multiplied with this, be the images padded to the canvas (as in Scenic) or squeezed into it (``size`` is then the
    canvas, and this the original size, as in transformers' first version).
    """
    sides = jnp.asarray(canvas, jnp.float32)
    return original_size.astype(jnp.float32) * sides / jnp.maximum(size, 1).astype(jnp.float32)


def decode_queried(
    predictions: QueriedPredictions,
    extent: Float[Array, "b 2"] | Int[Array, "b 2"],
    *,
    count: int = 100,
    exclusive: bool = False,
    nms_threshold: float | None = None,
) -> Detections:
    """The ``count`` best pairs of place and query, best first; labels are numbers of queries.

    ``extent`` is height and width of what boxes are relative to, in the pixels that are wanted (``batch_extent``).
    ``exclusive``: each place is an object of its best query alone, as in transformers. ``nms_threshold`` leaves out
    what overlaps a better object of the same query by more, as is usual for queries that are images: 0.3. The scores
    stay probabilities; transformers then stretches them so that the best is 1. Boxes are not cut off at the image.
    """
    logits = predictions.logits.astype(jnp.float32)
    b, n, q = logits.shape
    if exclusive:
        best = jnp.argmax(logits, axis=-1)[..., None]
        logits = jnp.where(jnp.arange(q) == best, logits, NOT_ASKED)
    flat = logits.reshape(b, n * q)
    boxes = scale_boxes(predictions.boxes_cxcywh, extent)
    chosen, valid = _best(flat, boxes, q, min(count, n * q), nms_threshold)
    scores = jax.nn.sigmoid(jnp.take_along_axis(flat, chosen, axis=1))
    found = jnp.take_along_axis(boxes, (chosen // q)[..., None], axis=1)
    return Detections(found, scores, (chosen % q).astype(jnp.int32), valid)


def _best(flat: Float[Array, "b m"], boxes: Float[Array, "b n 4"], q: int, count: int, threshold: float | None):
    """Places in ``flat`` of the best pairs, and whether there is one. Those that were not asked for are none."""
    asked = flat > NOT_ASKED / 2
    if threshold is None:
        values, chosen = lax.top_k(flat, count)
        return chosen, values > NOT_ASKED / 2
    pairs = jnp.arange(flat.shape[1])
    labels = jnp.broadcast_to(pairs % q, flat.shape)
    return select_best(nms(boxes[:, pairs // q], flat, threshold=threshold, labels=labels, valid=asked), flat, count)
