"""What CenterNet's necks are made of: a 3x3 convolution, plain or deformable, batch norm and ReLU."""

from typing import Literal, get_args

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.resnet import Norm
from eqvision.layers import BatchNorm, Conv, FrozenBatchNorm
from eqvision.layers.deform_conv import DeformConv

Convolution = Literal["plain", "deformable"]


class ConvBlock(eqx.Module):
    """The deformable convolution has a bias, as in the published weights, and the plain one has none."""

    conv: Conv | DeformConv
    norm: BatchNorm | FrozenBatchNorm

    def __init__(self, in_channels: int, out_channels: int, *, conv: Convolution, norm: Norm, key: PRNGKeyArray):
        if conv not in get_args(Convolution):
            raise ValueError(f"conv {conv!r} is unknown; choose from {get_args(Convolution)}")
        if norm not in get_args(Norm):
            raise ValueError(f"norm {norm!r} is unknown; choose from {get_args(Norm)}")
        build = Conv if conv == "plain" else DeformConv
        self.conv = build(in_channels, out_channels, 3, padding=1, key=key)
        self.norm = BatchNorm(out_channels) if norm == "batch" else FrozenBatchNorm(out_channels)

    def __call__(
        self, x: Float[Array, "b h w i"], state: eqx.nn.State, *, train: bool
    ) -> tuple[Float[Array, "b h w o"], eqx.nn.State]:
        y, state = self.norm(self.conv(x), state, train=train)
        return jax.nn.relu(y), state
