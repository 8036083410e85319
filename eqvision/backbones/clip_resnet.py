"""The modified ResNet of CLIP (Radford et al. 2021, section 2.4): three convolutions as stem, averages for strides."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.checks import check_images, check_layer
from eqvision.backbones.resnet import ConvNorm, Norm
from eqvision.layers import average_pool
from eqvision.types import Features, Images

EXPANSION = 4


class ClipBottleneck(eqx.Module):
    """1x1, 3x3, 1x1; where the stride is 2, an average over 2x2 stands before the last, and before the projection."""

    convs: tuple[ConvNorm, ...]
    projection: ConvNorm | None
    stride: int = eqx.field(static=True)

    def __init__(self, in_channels: int, width: int, stride: int, *, norm: Norm = "batch", key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        out = EXPANSION * width
        self.convs = (
            ConvNorm(in_channels, width, 1, norm=norm, key=keys[0]),
            ConvNorm(width, width, 3, norm=norm, key=keys[1]),
            ConvNorm(width, out, 1, norm=norm, zero_scale=True, key=keys[2]),
        )
        changes = stride > 1 or in_channels != out
        self.projection = ConvNorm(in_channels, out, 1, norm=norm, key=keys[3]) if changes else None
        self.stride = stride

    def __call__(
        self, x: Float[Array, "b h w i"], state: eqx.nn.State, *, train: bool
    ) -> tuple[Float[Array, "b h2 w2 o"], eqx.nn.State]:
        y = x
        for conv in self.convs[:2]:
            y, state = conv(y, state, train=train)
            y = jax.nn.relu(y)
        y, state = self.convs[2](self._averaged(y), state, train=train)
        if self.projection is not None:
            x, state = self.projection(self._averaged(x), state, train=train)
        return jax.nn.relu(x + y), state

    def _averaged(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return x if self.stride == 1 else average_pool(x, self.stride, stride=self.stride)


class ClipResNet(eqx.Module):
    """Stem and four stages; returns the map of every stage, fine to coarse. CLIP pools the last by attention."""

    stem: tuple[ConvNorm, ...]
    stages: tuple[tuple[ClipBottleneck, ...], ...]
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        depths: tuple[int, ...],
        width: int,
        *,
        in_channels: int = 3,
        norm: Norm = "batch",
        key: PRNGKeyArray,
    ):
        """``depths`` are the blocks of the stages; ``width`` is that of the stem and of the first stage's 3x3."""
        keys = iter(jax.random.split(key, sum(depths) + 3))
        self.stem = (
            ConvNorm(in_channels, width // 2, 3, stride=2, norm=norm, key=next(keys)),
            ConvNorm(width // 2, width // 2, 3, norm=norm, key=next(keys)),
            ConvNorm(width // 2, width, 3, norm=norm, key=next(keys)),
        )
        stages, channels = [], width
        for s, depth in enumerate(depths):
            stage = []
            for b in range(depth):
                stride = 2 if s and not b else 1
                stage.append(ClipBottleneck(channels, width * 2**s, stride, norm=norm, key=next(keys)))
                channels = EXPANSION * width * 2**s
            stages.append(tuple(stage))
        self.stages = tuple(stages)
        self.in_channels = in_channels
        self.channels = tuple(EXPANSION * width * 2**s for s in range(len(depths)))
        self.strides = tuple(4 * 2**s for s in range(len(depths)))

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        del key
        check_images(images, self.in_channels)
        x = images
        for conv in self.stem:
            x, state = conv(x, state, train=train)
            x = jax.nn.relu(x)
        x, features = average_pool(x, 2, stride=2), []
        for stage in self.stages:
            for block in stage:
                x, state = block(x, state, train=train)
            features.append(x)
        return tuple(features), state

    def intermediates(self, images: Images, state: eqx.nn.State, layers: tuple[int, ...]) -> Features:
        """Maps of the stages ``layers``; negative counts from the end."""
        features, _ = self(images, state)
        return tuple(features[check_layer(layer, len(features))] for layer in layers)
