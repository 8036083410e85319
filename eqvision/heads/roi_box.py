"""Box head of Fast R-CNN (Girshick 2015): what is in a box, and where its object really is."""

import functools
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers import Linear, NormedConv, NormKind, he_normal_fan_out, normal, torch_linear
from eqvision.necks.fpn import caffe2_xavier

Init = Literal["torch", "detectron2"]


class RoIBoxHead(eqx.Module):
    """Convolutions of 3x3, then linear layers, each with ReLU; then ``num_outputs`` logits, and differences of boxes.

    The published heads: two linear layers of 1024 and no convolution (v1, detectron2), or four convolutions with a
    norm and one linear layer (v2, "4conv1fc"). ``num_outputs`` counts the background. ``num_boxes`` is how many boxes
    are predicted: one for each class, or 1 for all.

    ``init``: ``torch`` as torchvision starts, ``detectron2`` with its Xavier and deviations 0.01 of logits and 0.001
    of differences. Weights of the first linear layer run over y, x and channels, torch's over channels, y and x.
    """

    convs: tuple[NormedConv, ...]
    layers: tuple[Linear, ...]
    logits: Linear
    deltas: Linear

    def __init__(
        self,
        channels: int,
        *,
        num_outputs: int,
        num_boxes: int,
        bins: int = 7,
        num_convs: int = 0,
        num_linears: int = 2,
        width: int = 1024,
        norm: NormKind = "none",
        init: Init = "torch",
        key: PRNGKeyArray,
    ):
        if init not in get_args(Init):
            raise ValueError(f"RoIBoxHead: init {init!r} is unknown; choose from {get_args(Init)}")
        keys = jax.random.split(key, 4)
        self.convs = tuple(
            NormedConv(channels, channels, 3, norm=norm, init=he_normal_fan_out, key=k)
            for k in jax.random.split(keys[0], num_convs)
        )
        widths = (channels * bins**2, *(width for _ in range(num_linears)))
        linear = torch_linear if init == "torch" else functools.partial(Linear, init=caffe2_xavier)
        self.layers = tuple(
            linear(widths[i], widths[i + 1], key=k) for i, k in enumerate(jax.random.split(keys[1], num_linears))
        )
        self.logits = _predictor(widths[-1], num_outputs, 0.01, init, keys[2])
        self.deltas = _predictor(widths[-1], 4 * num_boxes, 0.001, init, keys[3])

    def __call__(
        self, x: Float[Array, "n p p c"], state: eqx.nn.State, *, train: bool = False
    ) -> tuple[tuple[Float[Array, "n k"], Float[Array, "n boxes 4"]], eqx.nn.State]:
        """Logits and differences, float32, of pooled maps of boxes."""
        for conv in self.convs:
            x, state = conv(x, state, train=train)
            x = jax.nn.relu(x)
        flat = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            flat = jax.nn.relu(layer(flat))
        logits, deltas = (head(flat).astype(jnp.float32) for head in (self.logits, self.deltas))
        return (logits, deltas.reshape(flat.shape[0], -1, 4)), state


def _predictor(width: int, outputs: int, std: float, init: Init, key: PRNGKeyArray) -> Linear:
    if init == "torch":
        return torch_linear(width, outputs, key=key)
    return Linear(width, outputs, init=functools.partial(normal, std=std), key=key)
