"""Terms of CenterNet2's first stage (Zhou et al. 2021): a focal loss of the heatmap, GIoU of boxes near centres.

``losses.rcnn_loss`` takes them in the place of a region proposal network's, under the same two names.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from eqvision.losses.boxes import box_giou
from eqvision.losses.centernet import SMALLEST_PROBABILITY
from eqvision.losses.reduce import mask_rows
from eqvision.types import CenterSample

ALPHA, BETA, GAMMA = 0.25, 4, 2  # share of the centres; sparing cells near a centre; sparing what is right already


def center_totals(sample: CenterSample, weights: Float[Array, " b"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What the two terms are divided by: centres, and cells with a box. An image without any counts as one (Scenic)."""
    weights = weights.astype(jnp.float32)

    def total(cells: Bool[Array, "b n"]) -> Float[Array, ""]:
        each = jnp.maximum(jnp.sum(cells & sample.valid, axis=1), 1).astype(jnp.float32)
        return jnp.where(weights != 0, weights * each, 0.0).sum()

    return total(sample.heatmap == 1), total(sample.positive)


def heatmap_focal(sample: CenterSample, weights: Float[Array, " b"]) -> Float[Array, ""]:
    """Sum over images and cells. Nearer to 0 and 1 than 1e-4 there is no gradient, as published."""
    each = jnp.where(sample.valid, weights.astype(jnp.float32)[:, None], 0.0)
    p = jax.nn.sigmoid(mask_rows(sample.logits.astype(jnp.float32), each))
    p = jnp.clip(p, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    heatmap = mask_rows(sample.heatmap, each)
    centres = ALPHA * (1 - p) ** GAMMA * jnp.log(p)
    others = (1 - ALPHA) * (1 - heatmap) ** BETA * p**GAMMA * jnp.log1p(-p)
    return -(jnp.where(heatmap == 1, centres, others) * each).sum()


def distance_giou(sample: CenterSample, weights: Float[Array, " b"]) -> Float[Array, ""]:
    """Sum of 1 - GIoU over images and cells that have an object."""
    each = jnp.where(sample.valid & sample.positive, weights.astype(jnp.float32)[:, None], 0.0)
    boxes, goals = (_around_cell(mask_rows(x, each)) for x in (sample.distances, sample.targets))
    return (box_giou(boxes, goals) * each).sum()


def _around_cell(distances: Float[Array, "b n 4"]) -> Float[Array, "b n 4"]:
    return distances * jnp.array([-1.0, -1.0, 1.0, 1.0])
