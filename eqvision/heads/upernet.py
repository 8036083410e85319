"""UPerNet's head (Xiao et al. 2018): pyramid pooling of the last map, a feature pyramid, and all maps side by side."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.resnet import ConvNorm
from eqvision.heads.segmentation import Map, MapLogits, PixelHead, conv_relu
from eqvision.ops import resize_bilinear
from eqvision.ops.adaptive_pool import adaptive_average_pool
from eqvision.types import Features

SCALES = (1, 2, 3, 6)


class PyramidPooling(eqx.Module):
    """The map, and its means over 1, 2x2, 3x3 and 6x6 cells, each enlarged; a 3x3 convolution joins them (PSPNet)."""

    pools: tuple[ConvNorm, ...]
    join: ConvNorm
    scales: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, in_channels: int, width: int, *, scales: tuple[int, ...] = SCALES, key: PRNGKeyArray):
        keys = jax.random.split(key, len(scales) + 1)
        self.pools = tuple(ConvNorm(in_channels, width, 1, key=each) for each in keys[1:])
        self.join = ConvNorm(in_channels + len(scales) * width, width, 3, key=keys[0])
        self.scales = scales

    def __call__(
        self, x: Map, state: eqx.nn.State, *, train: bool = False
    ) -> tuple[Float[Array, "b h w o"], eqx.nn.State]:
        parts = [x]
        for scale, conv in zip(self.scales, self.pools, strict=True):
            y, state = conv_relu(conv, adaptive_average_pool(x, scale), state, train=train)
            parts.append(resize_bilinear(y, (x.shape[1], x.shape[2])))
        return conv_relu(self.join, jnp.concatenate(parts, axis=-1), state, train=train)


class UPerNetHead(eqx.Module):
    """For a pyramid of maps, whose logits have the size of the first. ``width`` is 512 in the published models.

    As mmsegmentation and transformers: each map but the last by a 1x1 convolution, the last by pyramid pooling; coarse
    sums enlarged bilinearly and added to finer ones; 3x3 convolutions, and one of all levels side by side. Every
    convolution has batch norm and ReLU.
    """

    pooling: PyramidPooling
    laterals: tuple[ConvNorm, ...]
    outputs: tuple[ConvNorm, ...]
    join: ConvNorm
    pixels: PixelHead

    def __init__(
        self,
        channels: tuple[int, ...],
        num_classes: int,
        *,
        width: int = 512,
        scales: tuple[int, ...] = SCALES,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 5)
        self.pooling = PyramidPooling(channels[-1], width, scales=scales, key=keys[0])
        fine = channels[:-1]
        self.laterals = tuple(
            ConvNorm(c, width, 1, key=k) for c, k in zip(fine, jax.random.split(keys[1], len(fine)), strict=True)
        )
        self.outputs = tuple(ConvNorm(width, width, 3, key=k) for k in jax.random.split(keys[2], len(fine)))
        self.join = ConvNorm(len(channels) * width, width, 3, key=keys[3])
        self.pixels = PixelHead(width, num_classes, key=keys[4])

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[MapLogits, eqx.nn.State]:
        del key
        above, state = self.pooling(features[-1], state, train=train)
        maps, size = [above], (features[0].shape[1], features[0].shape[2])
        for x, lateral, output in reversed(list(zip(features[:-1], self.laterals, self.outputs, strict=True))):
            y, state = conv_relu(lateral, x, state, train=train)
            above = y + resize_bilinear(above, (y.shape[1], y.shape[2]))
            y, state = conv_relu(output, above, state, train=train)
            maps.insert(0, y)
        x = jnp.concatenate([resize_bilinear(y, size) for y in maps], axis=-1)
        x, state = conv_relu(self.join, x, state, train=train)
        return self.pixels((x,), state)

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "UPerNetHead":
        """The same with a fresh last convolution."""
        return eqx.tree_at(lambda head: head.pixels, self, self.pixels.reset(num_classes, key=key))
