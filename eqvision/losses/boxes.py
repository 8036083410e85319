"""Box losses: one float32 value per pair of boxes, to be masked, summed and divided by the caller."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from eqvision.ops.boxes import elementwise_giou


def box_l1(predictions: Float[Array, "*n 4"], targets: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Sum of the four absolute differences, with gradient 0 where a difference is 0. Any format that both share."""
    difference = predictions.astype(jnp.float32) - targets.astype(jnp.float32)
    return (jnp.sign(difference) * difference).sum(axis=-1)  # the gradient of jnp.abs at 0 is 1


def box_giou(predictions: Float[Array, "*n 4"], targets: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """``1 - GIoU`` of boxes xyxy, in [0, 2] (Rezatofighi et al. 2019); finite for empty boxes, which have loss 1 or
    more.
    """
    return 1 - elementwise_giou(predictions, targets)
