"""The contracting path of U-Net (Ronneberger et al. 2015), in the paper's form and in the one that people use."""

import math
from typing import Literal, get_args

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.checks import check_images, check_layer
from eqvision.layers import BatchNorm, Conv, GroupNorm, dropout, fold, max_pool, normal
from eqvision.types import Features, Images

UNetNorm = Literal["none", "batch", "group"]
Border = Literal["same", "valid"]

GROUP = 16  # channels of a group: Wu and He 2018, table 3, find it as good as 32 groups, and narrow levels have it too


class DoubleConv(eqx.Module):
    """Twice a 3x3 convolution, a norm if any, and ReLU. Convolutions have a bias where no norm follows.

    ``border`` ``same`` puts zeros around each map, ``valid`` loses two pixels of each side. ``stride`` is that of the
    first convolution. Group norm has 16 channels in each group.
    """

    convs: tuple[Conv, ...]
    norms: tuple[BatchNorm | GroupNorm | None, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        between: int | None = None,
        norm: UNetNorm,
        border: Border,
        stride: int = 1,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key)
        between = out_channels if between is None else between
        options = {"padding": 1 if border == "same" else 0, "use_bias": norm == "none", "init": he_normal}
        self.convs = (
            Conv(in_channels, between, 3, stride=stride, **options, key=keys[0]),
            Conv(between, out_channels, 3, **options, key=keys[1]),
        )
        self.norms = (_norm(norm, between), _norm(norm, out_channels))

    def __call__(
        self, x: Float[Array, "b h w i"], state: eqx.nn.State, *, train: bool = False
    ) -> tuple[Float[Array, "b h2 w2 o"], eqx.nn.State]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x)
            if isinstance(norm, BatchNorm):
                x, state = norm(x, state, train=train)
            elif norm is not None:
                x = norm(x)
            x = jax.nn.relu(x)
        return x, state


class UNetEncoder(eqx.Module):
    """Two convolutions at each level, and between levels the largest of each 2x2 pixels; gives the map of each level.

    ``channels`` are those of the levels, the first at the size of the images divided by ``stem_stride``. ``dropout`` is
    on the last map, "at the end of the contracting path". With ``border="valid"`` a side of an image must be even
    before each pooling: ``legal_sides`` has the rule.

    Raises ValueError for an unknown norm or border, and for fewer than two levels.
    """

    levels: tuple[DoubleConv, ...]
    dropout: float = eqx.field(static=True)
    border: Border = eqx.field(static=True)
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        channels: tuple[int, ...],
        *,
        in_channels: int = 3,
        norm: UNetNorm = "batch",
        border: Border = "same",
        stem_stride: int = 1,
        dropout: float = 0.0,
        key: PRNGKeyArray,
    ):
        check_options(norm, border)
        if len(channels) < 2:
            raise ValueError(f"a U-Net has at least two levels, got channels {channels}")
        if border == "valid" and stem_stride != 1:
            raise ValueError(f"a U-Net with border 'valid' reads every pixel; stem_stride must be 1, got {stem_stride}")
        inputs, keys = (in_channels, *channels[:-1]), jax.random.split(key, len(channels))
        self.levels = tuple(
            DoubleConv(i, o, norm=norm, border=border, stride=1 if level else stem_stride, key=keys[level])
            for level, (i, o) in enumerate(zip(inputs, channels, strict=True))
        )
        self.dropout = dropout
        self.border = border
        self.in_channels = in_channels
        self.channels = channels
        self.strides = tuple(stem_stride << level for level in range(len(channels)))

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        check_images(images, self.in_channels)
        check_sides(images.shape[1:3], self.border, self.strides)
        x, features = images, []
        for number, level in enumerate(self.levels):
            x = max_pool(x, 2, stride=2) if number else x
            x, state = level(x, state, train=train)
            features.append(x)
        features[-1] = dropout(x, self.dropout, train=train, key=fold(key, 0))
        return tuple(features), state

    def intermediates(self, images: Images, state: eqx.nn.State, layers: tuple[int, ...]) -> Features:
        """Maps of the levels ``layers``; negative counts from the end."""
        features, _ = self(images, state)
        return tuple(features[check_layer(layer, len(features))] for layer in layers)


def he_normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Ronneberger et al. 2015, section 3: standard deviation sqrt(2 / N) for N incoming nodes."""
    return normal(key, shape, math.sqrt(2 / math.prod(shape[:-1])))


def check_options(norm: str, border: str) -> None:
    """Raise ValueError for a norm or border that there is none of."""
    if norm not in get_args(UNetNorm):
        raise ValueError(f"U-Net norm {norm!r} is unknown; choose from {get_args(UNetNorm)}")
    if border not in get_args(Border):
        raise ValueError(f"U-Net border {border!r} is unknown; choose from {get_args(Border)}")


def legal_side(at_least: int, poolings: int) -> int:
    """The smallest side of an image, not below ``at_least``, that a U-Net of VALID convolutions can read.

    A map of n pixels at the lowest level comes from 2^p n + 4 (2^p - 1) pixels after p poolings, and gives
    ``lost_pixels`` fewer, of which one must remain.
    """
    scale = 2**poolings
    lost = 4 * (scale - 1)
    smallest = lost_pixels(poolings) + 1
    return -(-(max(at_least, smallest) - lost) // scale) * scale + lost


def lost_pixels(poolings: int) -> int:
    """By how many pixels the result of a U-Net of VALID convolutions is shorter than its image: 184 in the paper."""
    return 4 * 2**poolings + 8 * (2**poolings - 1)


def check_sides(sides: tuple[int, ...], border: Border, strides: tuple[int, ...]) -> None:
    """Raise ValueError, with the nearest legal sizes, for images that a U-Net cannot read."""
    poolings, given = len(strides) - 1, f"{sides[0]}x{sides[1]}"
    if border == "same":
        if min(sides) < strides[-1]:
            raise ValueError(
                f"images of {given} are too small for a U-Net whose lowest level has stride {strides[-1]}; "
                f"each side needs at least {strides[-1]} pixels: enlarge or pad them, or take fewer levels"
            )
    elif any(legal_side(side, poolings) != side for side in sides):
        above = "x".join(str(legal_side(side, poolings)) for side in sides)
        step, smallest = 2**poolings, legal_side(1, poolings)
        raise ValueError(
            f"images of {given} do not fit a U-Net of VALID convolutions with {poolings} poolings: each side must be "
            f"{smallest} + a multiple of {step}, so that it is even before every pooling; mirror them to {above}, "
            f"whose result is {lost_pixels(poolings)} pixels smaller, or build the U-Net with mirror=True"
        )


def _norm(kind: UNetNorm, channels: int) -> BatchNorm | GroupNorm | None:
    if kind == "batch":
        return BatchNorm(channels)
    return GroupNorm(channels, num_groups=max(1, channels // GROUP)) if kind == "group" else None
