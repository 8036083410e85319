"""Deformable convolution that computes its own offsets and mask."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers.conv import Conv
from eqvision.layers.init import uniform
from eqvision.ops.deform_conv import deform_conv


class DeformConv(eqx.Module):
    """Modulated deformable convolution, as ``DCN`` of CenterNet's code (DCNv2, Zhu et al. 2019).

    ``conv_offset_mask`` is an ordinary convolution with the same window, stride and padding that gives 3 channels for
    each of ``groups`` and points of the window: (y, x) of every point first, group by group, and then the masks
    before their sigmoid. It starts at zero, so that a fresh layer is an ordinary convolution times 0.5.

    Checkpoints name the parameters as here: ``weight`` (out, in, height, width there), ``bias``,
    ``conv_offset_mask.weight`` and ``conv_offset_mask.bias``, whose 27 output channels for a 3x3 window keep their
    order.
    """

    weight: Float[Array, "kh kw i o"]
    bias: Float[Array, " o"]
    conv_offset_mask: Conv
    stride: int = eqx.field(static=True)
    padding: int = eqx.field(static=True)
    dilation: int = eqx.field(static=True)
    groups: int = eqx.field(static=True)
    block_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        block_size: int | None = 4096,
        key: PRNGKeyArray,
    ):
        """``padding``: None keeps the size of the map at stride 1. ``block_size`` is that of ``deform_conv``."""
        if in_channels % groups:
            raise ValueError(f"DeformConv: {in_channels} channels cannot be split into {groups} groups of equal size")
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.weight = uniform(key, shape, 1 / math.sqrt(in_channels * kernel_size**2))
        self.bias = jnp.zeros((out_channels,))
        self.stride = stride
        self.padding = dilation * (kernel_size // 2) if padding is None else padding
        self.dilation = dilation
        self.groups = groups
        self.block_size = block_size
        self.conv_offset_mask = Conv(
            in_channels,
            3 * groups * kernel_size**2,
            kernel_size,
            stride=stride,
            padding=self.padding,
            dilation=dilation,
            use_bias=True,
            init=_zeros,
            key=key,
        )

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        guide = self.conv_offset_mask(x).astype(jnp.float32)
        points = self.groups * self.weight.shape[0] * self.weight.shape[1]
        offsets, mask = guide[..., : 2 * points], jax.nn.sigmoid(guide[..., 2 * points :])
        shape = (*guide.shape[:3], self.groups, points // self.groups)
        y = deform_conv(
            x,
            offsets.reshape(*shape, 2),
            mask.reshape(shape),
            self.weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            block_size=self.block_size,
        )
        return y + self.bias.astype(x.dtype)


def _zeros(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    return jnp.zeros(shape)
