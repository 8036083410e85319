"""What a model of images and text is trained for, by the name of its loss."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from eqvision.losses.contrastive import contrastive_loss, sigmoid_loss
from eqvision.types import ClipOutputs

PairLoss = Literal["softmax", "sigmoid"]


def pair_loss(
    outputs: ClipOutputs,
    weights: Float[Array, " b"],
    counts: Float[Array, ""],
    *,
    loss: PairLoss = "softmax",
    chunk: int = 1024,
) -> Float[Array, ""]:
    """This device's share of the loss of the global batch, whose ``weights`` sum up to ``counts``. A model without a
    bias has 0."""
    image, text, scale, bias = outputs
    if loss == "softmax":
        return contrastive_loss(image, text, scale, weights, count=counts, chunk=chunk)
    bias = jnp.zeros(()) if bias is None else bias
    return sigmoid_loss(image, text, scale, bias, weights, count=counts, chunk=chunk)
