"""The expanding path of U-Net (Ronneberger et al. 2015): each level is doubled and joined with the map beside it."""

from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.unet import Border, DoubleConv, UNetNorm, check_options
from eqvision.layers import ConvTranspose
from eqvision.necks.checks import check_features, check_levels
from eqvision.ops import resize_bilinear
from eqvision.types import Features

Upsampling = Literal["transposed", "bilinear"]
Map = Float[Array, "b h w c"]
Beside = Float[Array, "b h2 w2 d"]


class UNetLevel(eqx.Module):
    """One level: the coarser map doubled, behind the encoder's map in the channels, then two convolutions.

    ``border`` ``valid`` cuts the encoder's map to the size of the doubled one; ``same`` puts zeros around the doubled
    map where the encoder's is a pixel larger, the odd one at the end.
    """

    up: ConvTranspose | None
    convs: DoubleConv
    border: Border = eqx.field(static=True)

    def __init__(
        self,
        coarse: int,
        skip: int,
        out_channels: int,
        *,
        up: Upsampling,
        norm: UNetNorm,
        border: Border,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key)
        self.up = ConvTranspose(coarse, skip, 2, stride=2, key=keys[0]) if up == "transposed" else None
        joined = skip + (skip if up == "transposed" else coarse)
        between = out_channels if up == "transposed" else joined // 2
        self.convs = DoubleConv(joined, out_channels, between=between, norm=norm, border=border, key=keys[1])
        self.border = border

    def __call__(
        self, coarse: Map, skip: Beside, state: eqx.nn.State, *, train: bool = False
    ) -> tuple[Float[Array, "b h3 w3 o"], eqx.nn.State]:
        x = double(coarse) if self.up is None else self.up(coarse)
        if self.border == "valid":
            skip = cut(skip, x.shape[1:3])
        else:
            x = surround(x, skip.shape[1:3])
        return self.convs(jnp.concatenate([skip, x], axis=-1), state, train=train)


class UNetDecoder(eqx.Module):
    """From the maps of a ``UNetEncoder`` to maps of all its levels but the last; the first is for the head.

    ``up`` ``transposed`` doubles by a 2x2 transposed convolution, as the paper; ``bilinear`` by interpolation with
    aligned corners, after levels that have half as many channels (milesial/Pytorch-UNet's ``bilinear=True``).
    Raises ValueError for unknown names and for strides that do not double.
    """

    levels: tuple[UNetLevel, ...]
    in_channels: tuple[int, ...] = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        *,
        up: Upsampling = "transposed",
        norm: UNetNorm = "batch",
        border: Border = "same",
        key: PRNGKeyArray,
    ):
        check_options(norm, border)
        if up not in get_args(Upsampling):
            raise ValueError(f"U-Net up {up!r} is unknown; choose from {get_args(Upsampling)}")
        check_levels("UNetDecoder", channels, strides)
        skips = channels[:-1]
        outputs = skips if up == "transposed" else (skips[0], *skips[:-1])
        keys = jax.random.split(key, len(skips))
        self.levels = tuple(
            UNetLevel(coarse, skip, out, up=up, norm=norm, border=border, key=each)
            for coarse, skip, out, each in zip((*outputs[1:], channels[-1]), skips, outputs, keys, strict=True)
        )
        self.in_channels = channels
        self.channels = outputs
        self.strides = strides[:-1]

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        del key
        check_features("UNetDecoder", features, self.in_channels)
        x, maps = features[-1], []
        for level, skip in reversed(list(zip(self.levels, features[:-1], strict=True))):
            x, state = level(x, skip, state, train=train)
            maps.insert(0, x)
        return tuple(maps), state


def double(x: Map) -> Beside:
    """Twice as high and wide, bilinear with the corners' centres in their places."""
    return resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=True)


def surround(x: Map, size: tuple[int, ...]) -> Beside:
    """With zeros around to a larger size, the odd one at the bottom and at the right."""
    more = [new - old for old, new in zip(x.shape[1:3], size, strict=True)]
    rows, columns = ((extra // 2, extra - extra // 2) for extra in more)
    return jnp.pad(x, ((0, 0), rows, columns, (0, 0)))


def cut(x: Map, size: tuple[int, ...]) -> Beside:
    """The middle of a map, of the given size."""
    top, left = ((old - new) // 2 for old, new in zip(x.shape[1:3], size, strict=True))
    return x[:, top : top + size[0], left : left + size[1]]
