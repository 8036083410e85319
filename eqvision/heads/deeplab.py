"""DeepLabV3 (Chen et al. 2017) and DeepLabV3+ (Chen et al. 2018): convolutions of several dilations side by side."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.resnet import ConvNorm
from eqvision.heads.segmentation import Map, MapLogits, PixelHead, conv_relu
from eqvision.layers import dropout, fold
from eqvision.ops import resize_bilinear
from eqvision.types import Features

LOW_WIDTH = 48  # Chen et al. 2018, section 4.1


class ASPP(eqx.Module):
    """Atrous spatial pyramid pooling: a 1x1 convolution, 3x3 ones of the dilations ``rates``, and the mean of the map.

    All are ``width`` wide with batch norm and ReLU; one more 1x1 convolution joins them, and ``dropout`` follows.
    """

    convs: tuple[ConvNorm, ...]
    pool: ConvNorm
    project: ConvNorm
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        width: int = 256,
        *,
        rates: tuple[int, ...] = (12, 24, 36),
        dropout: float = 0.5,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, len(rates) + 3)
        dilated = (ConvNorm(in_channels, width, 3, dilation=r, key=k) for r, k in zip(rates, keys[3:], strict=True))
        self.convs = (ConvNorm(in_channels, width, 1, key=keys[0]), *dilated)
        self.pool = ConvNorm(in_channels, width, 1, key=keys[1])
        self.project = ConvNorm((len(rates) + 2) * width, width, 1, key=keys[2])
        self.dropout = dropout

    def __call__(
        self, x: Map, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "b h w o"], eqx.nn.State]:
        parts = []
        for conv in self.convs:
            y, state = conv_relu(conv, x, state, train=train)
            parts.append(y)
        mean = jnp.mean(x.astype(jnp.float32), axis=(1, 2), keepdims=True).astype(x.dtype)
        y, state = conv_relu(self.pool, mean, state, train=train)
        parts.append(jnp.broadcast_to(y, parts[0].shape))
        y, state = conv_relu(self.project, jnp.concatenate(parts, axis=-1), state, train=train)
        return dropout(y, self.dropout, train=train, key=key), state


class DeepLabV3Head(eqx.Module):
    """ASPP, a 3x3 convolution and a 1x1 one, on the last map; torchvision's rates are 12, 24, 36 at stride 8."""

    aspp: ASPP
    conv: ConvNorm
    pixels: PixelHead

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        width: int = 256,
        rates: tuple[int, ...] = (12, 24, 36),
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 3)
        self.aspp = ASPP(in_channels, width, rates=rates, key=keys[0])
        self.conv = ConvNorm(width, width, 3, key=keys[1])
        self.pixels = PixelHead(width, num_classes, key=keys[2])

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[MapLogits, eqx.nn.State]:
        x, state = self.aspp(features[-1], state, train=train, key=fold(key, 0))
        x, state = conv_relu(self.conv, x, state, train=train)
        return self.pixels((x,), state)

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "DeepLabV3Head":
        """The same with a fresh last convolution."""
        return eqx.tree_at(lambda head: head.pixels, self, self.pixels.reset(num_classes, key=key))


class DeepLabV3PlusHead(eqx.Module):
    """ASPP on the last map, enlarged to the first one (stride 4), 48 channels of which join it; two 3x3 convolutions.

    Chen et al. 2018, section 3.1 and tables 1 and 2; the convolutions are plain, as for their ResNet.
    """

    aspp: ASPP
    low: ConvNorm
    convs: tuple[ConvNorm, ...]
    pixels: PixelHead

    def __init__(
        self,
        in_channels: int,
        low_channels: int,
        num_classes: int,
        *,
        width: int = 256,
        rates: tuple[int, ...] = (6, 12, 18),
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 5)
        self.aspp = ASPP(in_channels, width, rates=rates, key=keys[0])
        self.low = ConvNorm(low_channels, LOW_WIDTH, 1, key=keys[1])
        self.convs = (
            ConvNorm(width + LOW_WIDTH, width, 3, key=keys[2]),
            ConvNorm(width, width, 3, key=keys[3]),
        )
        self.pixels = PixelHead(width, num_classes, key=keys[4])

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[MapLogits, eqx.nn.State]:
        x, state = self.aspp(features[-1], state, train=train, key=fold(key, 0))
        low, state = conv_relu(self.low, features[0], state, train=train)
        x = resize_bilinear(x, (low.shape[1], low.shape[2]))
        x = jnp.concatenate([x, low], axis=-1)
        for conv in self.convs:
            x, state = conv_relu(conv, x, state, train=train)
        return self.pixels((x,), state)

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "DeepLabV3PlusHead":
        """The same with a fresh last convolution."""
        return eqx.tree_at(lambda head: head.pixels, self, self.pixels.reset(num_classes, key=key))
