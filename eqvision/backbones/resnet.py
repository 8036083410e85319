"""Residual networks (He et al. 2016): v1.5 for ImageNet, with the stride in the 3x3, and the CIFAR form of sec. 4.2."""

from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.checks import check_images, check_layer
from eqvision.layers import BatchNorm, Conv, FrozenBatchNorm, max_pool
from eqvision.types import Features, Images

Shortcut = Literal["projection", "pad"]
Norm = Literal["batch", "frozen"]


class ConvNorm(eqx.Module):
    """A convolution without bias and its batch norm, which is trained or, for detectors, frozen."""

    conv: Conv
    norm: BatchNorm | FrozenBatchNorm

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        norm: Norm = "batch",
        zero_scale: bool = False,
        key: PRNGKeyArray,
    ):
        if norm not in get_args(Norm):
            raise ValueError(f"norm {norm!r} is unknown; choose from {get_args(Norm)}")
        padding = kernel_size // 2 * dilation  # symmetric, as torch pads; SAME would shift strided windows by a pixel
        self.conv = Conv(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, dilation=dilation, key=key
        )
        # A frozen scale of zero would shut its block off for good.
        weight_init = 0.0 if zero_scale else 1.0
        self.norm = (
            BatchNorm(out_channels, weight_init=weight_init) if norm == "batch" else FrozenBatchNorm(out_channels)
        )

    def __call__(
        self, x: Float[Array, "b h w i"], state: eqx.nn.State, *, train: bool
    ) -> tuple[Float[Array, "b h2 w2 o"], eqx.nn.State]:
        return self.norm(self.conv(x), state, train=train)


class ResidualBlock(eqx.Module):
    """A chain of convolutions added to a shortcut; ReLU between and after.

    The shortcut is the identity where shape does not change. Where it does it is a strided 1x1 projection
    (ImageNet, option B) or subsampling with zero channels appended (CIFAR, option A: no parameters).
    """

    convs: tuple[ConvNorm, ...]
    projection: ConvNorm | None
    stride: int = eqx.field(static=True)
    out_channels: int = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...],
        kernels: tuple[int, ...],
        strides: tuple[int, ...],
        *,
        shortcut: Shortcut,
        zero_scale: bool,
        norm: Norm = "batch",
        dilation: int = 1,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, len(widths) + 1)
        inputs = (in_channels, *widths[:-1])
        last = len(widths) - 1
        self.convs = tuple(
            ConvNorm(
                inputs[i],
                widths[i],
                kernels[i],
                stride=strides[i],
                dilation=dilation if kernels[i] > 1 else 1,
                norm=norm,
                zero_scale=zero_scale and i == last,
                key=keys[i],
            )
            for i in range(len(widths))
        )
        self.stride = max(strides)
        self.out_channels = widths[-1]
        changes = in_channels != widths[-1] or self.stride > 1
        project = changes and shortcut == "projection"
        self.projection = (
            ConvNorm(in_channels, widths[-1], 1, stride=self.stride, norm=norm, key=keys[-1]) if project else None
        )

    def __call__(
        self, x: Float[Array, "b h w i"], state: eqx.nn.State, *, train: bool
    ) -> tuple[Float[Array, "b h2 w2 o"], eqx.nn.State]:
        y = x
        for i, conv in enumerate(self.convs):
            y, state = conv(jax.nn.relu(y) if i else y, state, train=train)
        if self.projection is not None:
            x, state = self.projection(x, state, train=train)
        elif x.shape != y.shape:
            x = x[:, :: self.stride, :: self.stride]
            extra = y.shape[-1] - x.shape[-1]
            # Half on each side, as akamaster/pytorch_resnet_cifar10 pads; the paper does not say.
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
        return jax.nn.relu(x + y), state


class ResNet(eqx.Module):
    """Stem and stages of residual blocks; returns the map of every stage, fine to coarse.

    Not scanned: blocks of a stage differ in shape at their first member and carry running statistics.
    """

    stem: ConvNorm
    stages: tuple[tuple[ResidualBlock, ...], ...]
    pool_stem: bool = eqx.field(static=True)
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        stem: ConvNorm,
        stages: tuple[tuple[ResidualBlock, ...], ...],
        *,
        pool_stem: bool,
        in_channels: int,
    ):
        self.stem = stem
        self.stages = stages
        self.pool_stem = pool_stem
        self.in_channels = in_channels
        self.channels = tuple(stage[-1].out_channels for stage in stages)
        stride, strides = stem.conv.stride * (2 if pool_stem else 1), []
        for stage in stages:
            stride *= stage[0].stride
            strides.append(stride)
        self.strides = tuple(strides)

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        del key
        check_images(images, self.in_channels)
        x, state = self.stem(images, state, train=train)
        x = jax.nn.relu(x)
        x = max_pool(x, 3, stride=2, padding=1) if self.pool_stem else x
        features = []
        for stage in self.stages:
            for block in stage:
                x, state = block(x, state, train=train)
            features.append(x)
        return tuple(features), state

    def intermediates(self, images: Images, state: eqx.nn.State, layers: tuple[int, ...]) -> Features:
        """Maps of the stages ``layers``; negative counts from the end."""
        features, _ = self(images, state)
        return tuple(features[check_layer(layer, len(features))] for layer in layers)


# Blocks of each stage, and whether they are bottlenecks: He et al. 2016, table 1.
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


def resnet(
    depth: int,
    *,
    in_channels: int = 3,
    zero_scale: bool = True,
    norm: Norm = "batch",
    dilate_last: bool = False,
    dilated_stages: int = 0,
    width: int = 64,
    key: PRNGKeyArray,
) -> ResNet:
    """ResNet v1.5 of ``depth`` 18, 34, 50, 101 or 152.

    ``zero_scale`` starts each block's last batch norm at zero (Goyal et al. 2017), so that the block
    starts as its shortcut. ``norm="frozen"`` fixes all batch norms, scale and shift too, as detectors do.
    ``dilate_last`` is DETR's and Faster R-CNN's DC5: the last stage keeps the stride 16, and the 3x3 convolutions of
    all its blocks but the first have dilation 2, as ``replace_stride_with_dilation`` of torchvision.
    ``dilated_stages`` says of how many stages at the end this is so: with 2, as FCN and DeepLabV3 have it, the stride
    is 8, and the dilation 2 in the third stage's blocks and the fourth's first, and 4 in the fourth's others.
    ``width`` is that of the stem and the first stage; each further stage is twice as wide.

    Raises ValueError for another depth or norm, and for a dilated ResNet without bottlenecks, which torchvision
    does not have either.
    """
    if depth not in DEPTHS:
        raise ValueError(f"a ResNet of depth {depth} does not exist; choose from {', '.join(map(str, DEPTHS))}")
    blocks, bottleneck = DEPTHS[depth]
    dilated_stages = max(dilated_stages, int(dilate_last))
    if dilated_stages and not bottleneck:
        raise ValueError(f"dilate_last needs a ResNet of bottlenecks (50, 101, 152), got depth {depth}")
    if not 0 <= dilated_stages <= 3:
        raise ValueError(
            f"dilated_stages counts strided stages from the end, of which there are 3; got {dilated_stages}"
        )
    keys = iter(jax.random.split(key, sum(blocks) + 1))
    stem = ConvNorm(in_channels, width, 7, stride=2, norm=norm, key=next(keys))
    stages, channels, before = [], width, 1
    for i, count in enumerate(blocks):
        inner, stage = width * 2**i, []
        dilated = i >= len(blocks) - dilated_stages
        after = 2 * before if dilated else before
        for j in range(count):
            stride = 2 if i and not j and not dilated else 1
            dilation = after if j else before
            stage.append(_imagenet_block(channels, inner, stride, bottleneck, zero_scale, norm, dilation, next(keys)))
            channels = stage[-1].out_channels
        before = after
        stages.append(tuple(stage))
    return ResNet(stem, tuple(stages), pool_stem=True, in_channels=in_channels)


def _imagenet_block(
    in_channels: int,
    width: int,
    stride: int,
    bottleneck: bool,
    zero_scale: bool,
    norm: Norm,
    dilation: int,
    key: PRNGKeyArray,
) -> ResidualBlock:
    widths = (width, width, 4 * width) if bottleneck else (width, width)
    kernels = (1, 3, 1) if bottleneck else (3, 3)
    strides = (1, stride, 1) if bottleneck else (stride, 1)
    return ResidualBlock(
        in_channels,
        widths,
        kernels,
        strides,
        shortcut="projection",
        zero_scale=zero_scale,
        norm=norm,
        dilation=dilation,
        key=key,
    )


def resnet_cifar(depth: int, *, in_channels: int = 3, key: PRNGKeyArray) -> ResNet:
    """He et al. 2016 section 4.2: 6n+2 layers, widths 16, 32, 64, shortcuts without parameters (option A)."""
    if (depth - 2) % 6:
        raise ValueError(f"a CIFAR ResNet has 6n+2 layers (20, 32, 44, 56, 110), got {depth}")
    count = (depth - 2) // 6
    keys = iter(jax.random.split(key, 3 * count + 1))
    stem = ConvNorm(in_channels, 16, 3, key=next(keys))
    stages, channels = [], 16
    for i, width in enumerate((16, 32, 64)):
        stage = []
        for j in range(count):
            strides = (2 if i and not j else 1, 1)
            stage.append(
                ResidualBlock(
                    channels, (width, width), (3, 3), strides, shortcut="pad", zero_scale=False, key=next(keys)
                )
            )
            channels = width
        stages.append(tuple(stage))
    return ResNet(stem, tuple(stages), pool_stem=False, in_channels=in_channels)
