"""Transposed convolution with the numbers of ``torch.nn.ConvTranspose2d``, channels last."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers.init import uniform
from eqvision.layers.linear import Initializer

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def torch_default(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniform in 1 / sqrt(window * out): what torch takes for the fan in of a transposed convolution."""
    return uniform(key, shape, 1 / math.sqrt(math.prod(shape[:2]) * shape[-1]))


class ConvTranspose(eqx.Module):
    """Every cell puts ``weight`` times its value down, ``stride`` cells apart; where these overlap they are added.

    A side of n cells becomes (n - 1) * stride - 2 * padding + kernel_size. ``weight`` is stored (height, width, in per
    group, out), not flipped: torch's (in, out per group, height, width) without groups, moved to this order.
    Raises ValueError where the channels cannot be split into ``groups``, or the padding exceeds the window.
    """

    weight: Float[Array, "kh kw i o"]
    bias: Float[Array, " o"] | None
    stride: int = eqx.field(static=True)
    padding: int = eqx.field(static=True)
    groups: int = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int,
        padding: int = 0,
        groups: int = 1,
        use_bias: bool = True,
        init: Initializer = torch_default,
        key: PRNGKeyArray,
    ):
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"ConvTranspose: {in_channels} -> {out_channels} channels cannot be split into {groups} groups"
            )
        if not 0 <= padding < kernel_size:
            raise ValueError(f"ConvTranspose: padding {padding} must be at least 0 and below the window {kernel_size}")
        self.weight = init(key, (kernel_size, kernel_size, in_channels // groups, out_channels))
        self.bias = jnp.zeros((out_channels,)) if use_bias else None
        self.stride = stride
        self.padding = padding
        self.groups = groups

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        weight = self.weight.astype(x.dtype)
        apart = weight.shape[0] == self.stride and self.padding == 0 and self.groups == 1
        y = _side_by_side(x, weight) if apart else self._overlapping(x, weight)
        return y if self.bias is None else y + self.bias.astype(x.dtype)

    def _overlapping(self, x: Float[Array, "b h w i"], weight: Float[Array, "kh kw j o"]) -> Float[Array, "b h2 w2 o"]:
        margin = weight.shape[0] - 1 - self.padding
        return lax.conv_general_dilated(
            x,
            weight[::-1, ::-1],
            (1, 1),
            ((margin, margin), (margin, margin)),
            lhs_dilation=(self.stride, self.stride),
            dimension_numbers=_LAYOUT,
            feature_group_count=self.groups,
        )


def _side_by_side(x: Float[Array, "b h w i"], weight: Float[Array, "k k i o"]) -> Float[Array, "b h2 w2 o"]:
    """Windows apart: one matrix product. XLA:CPU takes 20 times as long for a dilated convolution's gradient."""
    (b, h, w, i), (k, _, _, o) = x.shape, weight.shape
    y = x.reshape(-1, i) @ weight.transpose(2, 0, 1, 3).reshape(i, k * k * o)
    return y.reshape(b, h, w, k, k, o).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * k, w * k, o)


def bilinear_upsampling(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Initialiser (kernel, kernel, 1, channels) of a depthwise transposed convolution: linear interpolation.

    For kernel = 2 * stride and padding = stride / 2 (Long et al. 2015, as in DLA and CenterNet); nothing is random.
    """
    del key
    half = -(-shape[0] // 2)
    centre = (2 * half - 1 - half % 2) / (2 * half)
    ramp = 1 - np.abs(np.arange(shape[0]) / half - centre)
    return jnp.broadcast_to(jnp.asarray(np.outer(ramp, ramp), jnp.float32)[:, :, None, None], shape)
