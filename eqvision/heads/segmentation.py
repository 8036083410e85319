"""From maps to the logits of each place: the plain heads, and what they are made of. Logits are float32 always."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.resnet import ConvNorm
from eqvision.layers import Conv, Initializer, dropout, fold, truncated_normal
from eqvision.types import Features

Map = Float[Array, "b h w c"]
MapLogits = Float[Array, "b h w k"]


class PixelHead(eqx.Module):
    """A 1x1 convolution of one map: the last layer of a U-Net. ``level`` says which map it reads."""

    conv: Conv
    level: int = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        level: int = 0,
        init: Initializer = truncated_normal,
        key: PRNGKeyArray,
    ):
        self.conv = Conv(in_channels, num_classes, 1, padding=0, use_bias=True, init=init, key=key)
        self.level = level

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[MapLogits, eqx.nn.State]:
        del train, key
        return self.conv(features[self.level].astype(jnp.float32)), state

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "PixelHead":
        """A fresh head for another number of classes."""
        return PixelHead(self.conv.weight.shape[2], num_classes, level=self.level, key=key)


class ConvHead(eqx.Module):
    """A convolution with batch norm and ReLU, dropout, and a 1x1 convolution: FCN's head, and SETR's naive one.

    torchvision's FCN has a 3x3 convolution to a quarter of the channels and ``dropout`` 0.1. SETR-naive has a 1x1
    convolution (Zheng et al. 2021, section 3.3), which reads a transformer's patches through ``PatchMap``.
    """

    conv: ConvNorm
    pixels: PixelHead
    level: int = eqx.field(static=True)
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        width: int,
        kernel_size: int = 3,
        level: int = -1,
        dropout: float = 0.1,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key)
        self.conv = ConvNorm(in_channels, width, kernel_size, key=keys[0])
        self.pixels = PixelHead(width, num_classes, key=keys[1])
        self.level = level
        self.dropout = dropout

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[MapLogits, eqx.nn.State]:
        x, state = conv_relu(self.conv, features[self.level], state, train=train)
        x = dropout(x, self.dropout, train=train, key=fold(key, 0))
        return self.pixels((x,), state)

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "ConvHead":
        """The same with a fresh last convolution."""
        return eqx.tree_at(lambda head: head.pixels, self, self.pixels.reset(num_classes, key=key))


def conv_relu(
    conv: ConvNorm, x: Map, state: eqx.nn.State, *, train: bool
) -> tuple[Float[Array, "b h2 w2 o"], eqx.nn.State]:
    """A convolution, its norm, and ReLU."""
    y, state = conv(x, state, train=train)
    return jax.nn.relu(y), state
