"""Costs of giving a target to a query, for bipartite matching, and the classes that a matching gives to queries.

The costs are those of DETR (Carion et al. 2020) and Deformable DETR (Zhu et al. 2021). Boxes are cxcywh in [0, 1] of
the image without its padding, all in float32. Leading axes (decoder layers, images) are broadcast.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eqvision.ops.boxes import cxcywh_to_xyxy, pairwise_giou, pairwise_l1

FOCAL_EPSILON = 1e-8  # inside the logarithms of the focal cost, as published


def softmax_cost(logits: Float[Array, "... q k"], labels: Int[Array, "... g"]) -> Float[Array, "... q g"]:
    """DETR's class cost: minus the softmax probability of the target's class, in [-1, 0]."""
    return -_of_labels(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), labels)


def focal_cost(
    logits: Float[Array, "... q k"], labels: Int[Array, "... g"], *, alpha: float = 0.25, gamma: float = 2.0
) -> Float[Array, "... q g"]:
    """Deformable DETR's class cost: the focal loss of the target's class as a positive, less that as a negative."""
    p = _of_labels(jax.nn.sigmoid(logits.astype(jnp.float32)), labels)
    positive = -alpha * (1 - p) ** gamma * jnp.log(p + FOCAL_EPSILON)
    negative = -(1 - alpha) * p**gamma * jnp.log(1 - p + FOCAL_EPSILON)
    return positive - negative


def box_cost(
    boxes_cxcywh: Float[Array, "... q 4"],
    targets_cxcywh: Float[Array, "... g 4"],
    *,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> Float[Array, "... q g"]:
    """Weighted sum of the L1 distance (of cxcywh) and of minus GIoU."""
    giou = pairwise_giou(cxcywh_to_xyxy(boxes_cxcywh), cxcywh_to_xyxy(targets_cxcywh))
    return l1_weight * pairwise_l1(boxes_cxcywh, targets_cxcywh) - giou_weight * giou


def query_labels(
    query_of_target: Int[Array, "l b g"], labels: Int[Array, "b g"], *, num_queries: int, unmatched: int
) -> Int[Array, "l b q"]:
    """The class of the target that each query was given, ``unmatched`` where it was given none."""
    # a negative index would count from the end, one past the end is dropped
    places = jnp.where(query_of_target < 0, num_queries, query_of_target)

    def scatter(places: Int[Array, " g"], labels: Int[Array, " g"]) -> Int[Array, " q"]:
        return jnp.full(num_queries, unmatched, labels.dtype).at[places].set(labels, mode="drop")

    return jax.vmap(jax.vmap(scatter), in_axes=(0, None))(places, labels)


def _of_labels(values: Float[Array, "... q k"], labels: Int[Array, "... g"]) -> Float[Array, "... q g"]:
    # a gather and not a product with one-hot rows, which accelerators round to fewer bits
    labels = jnp.broadcast_to(labels, (*values.shape[:-2], labels.shape[-1]))
    return jnp.take_along_axis(values, labels[..., None, :], axis=-1)
