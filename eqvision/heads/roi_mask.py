"""Mask head of Mask R-CNN (He et al. 2017): a small map of each box for each class."""

import functools
from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.heads.roi_box import Init
from eqvision.layers import Conv, ConvTranspose, NormedConv, NormKind, he_normal_fan_out, normal


class RoIMaskHead(eqx.Module):
    """Four 3x3 convolutions, a transposed one that doubles the map, each with ReLU; then a logit for each output.

    Pooled maps of 14x14 give masks of 28x28. ``num_outputs`` counts the background where the dialect has a mask for
    it (torchvision). detectron2 starts the last layer with a deviation of 0.001; all else is He et al. 2015 by fan out.
    """

    convs: tuple[NormedConv, ...]
    upsample: ConvTranspose
    logits: Conv

    def __init__(
        self,
        channels: int,
        *,
        num_outputs: int,
        depth: int = 4,
        width: int = 256,
        norm: NormKind = "none",
        init: Init = "torch",
        key: PRNGKeyArray,
    ):
        if init not in get_args(Init):
            raise ValueError(f"RoIMaskHead: init {init!r} is unknown; choose from {get_args(Init)}")
        keys = jax.random.split(key, depth + 2)
        widths = (channels, *(width for _ in range(depth)))
        self.convs = tuple(NormedConv(widths[i], widths[i + 1], 3, norm=norm, key=keys[i]) for i in range(depth))
        self.upsample = ConvTranspose(widths[-1], width, 2, stride=2, init=he_normal_fan_out, key=keys[-2])
        last = he_normal_fan_out if init == "torch" else functools.partial(normal, std=0.001)
        self.logits = Conv(width, num_outputs, 1, use_bias=True, init=last, key=keys[-1])

    def __call__(
        self, x: Float[Array, "n p p c"], state: eqx.nn.State, *, train: bool = False
    ) -> tuple[Float[Array, "n m m k"], eqx.nn.State]:
        """Logits, float32."""
        for conv in self.convs:
            x, state = conv(x, state, train=train)
            x = jax.nn.relu(x)
        return self.logits(jax.nn.relu(self.upsample(x))).astype(jnp.float32), state
