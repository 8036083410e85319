"""The heads of Deformable DETR: classes and boxes from queries, one pair for all decoder layers or one for each."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.heads.set_prediction import BoxMLP
from eqvision.layers import Linear
from eqvision.layers.torch_init import torch_linear

PRIOR = 0.01  # what every class is given before training (Lin et al. 2017, focal loss)
SMALL_SIDE = -2.0  # logit of a box's sides before training: 0.12 of the image


class PerLayerHead(eqx.Module):
    """``count`` pairs of class and box heads with stacked parameters, equal in the beginning as in the original.

    ``count`` is 1 where all layers share them, else one for each decoder layer, and one more for the encoder of a
    two-stage detector (the last). There is no background class: logits are for sigmoids. ``small_boxes`` starts the
    first box head with boxes of 0.12 of the image; it is False for two-stage detectors, whose encoder proposes sides.
    """

    classes: Linear
    boxes: BoxMLP

    def __init__(self, width: int, num_classes: int, count: int, *, small_boxes: bool = True, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.classes = _classes(width, num_classes, count, key=keys[0])
        self.boxes = _boxes(width, count, small_boxes, key=keys[1])

    @property
    def count(self) -> int:
        return self.classes.weight.shape[0]

    def logits(self, hidden: Float[Array, "l b q d"]) -> Float[Array, "l b q k"]:
        """Class logits of the queries behind every decoder layer, in float32."""
        weight, bias = self.classes.weight, self.classes.bias
        assert bias is not None
        if self.count > 1:
            weight, bias = weight[: len(hidden)], bias[: len(hidden)]
        return jnp.matmul(hidden.astype(jnp.float32), weight[:, None]) + bias[:, None, None]

    def first(self, count: int) -> BoxMLP:
        """The box heads of the decoder's ``count`` layers: a stack, or the one that they share."""
        return jax.tree.map(lambda leaf: leaf[:count] if self.count > 1 else leaf[0], self.boxes)

    def last(self) -> tuple[Linear, BoxMLP]:
        """Class and box head of a two-stage detector's encoder."""
        return jax.tree.map(lambda leaf: leaf[-1], (self.classes, self.boxes))

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "PerLayerHead":
        """The same boxes and fresh classes."""
        width = self.classes.weight.shape[1]
        return eqx.tree_at(lambda head: head.classes, self, _classes(width, num_classes, self.count, key=key))


def _classes(width: int, num_classes: int, count: int, *, key: PRNGKeyArray) -> Linear:
    linear = torch_linear(width, num_classes, key=key)
    prior = jnp.full((num_classes,), -math.log((1 - PRIOR) / PRIOR))
    return _repeated(eqx.tree_at(lambda layer: layer.bias, linear, prior), count)


def _boxes(width: int, count: int, small: bool, *, key: PRNGKeyArray) -> BoxMLP:
    """The last layer is zero, so that boxes start at their references."""
    last = lambda boxes: (boxes.layers[-1].weight, boxes.layers[-1].bias)  # noqa: E731
    boxes = _repeated(eqx.tree_at(last, BoxMLP(width, key=key), replace_fn=jnp.zeros_like), count)
    if not small:
        return boxes
    return eqx.tree_at(lambda b: b.layers[-1].bias, boxes, replace_fn=lambda bias: bias.at[0, 2:].set(SMALL_SIDE))


def _repeated(module, count: int):
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), module)
