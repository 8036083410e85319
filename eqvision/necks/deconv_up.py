"""The upsampling of CenterNet's ResNets (Xiao et al. 2018, and with deformable convolutions Zhou et al. 2019)."""

import itertools

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.resnet import Norm
from eqvision.layers import BatchNorm, ConvTranspose, FrozenBatchNorm
from eqvision.necks.checks import check_features, check_levels
from eqvision.necks.conv_block import ConvBlock, Convolution
from eqvision.types import Features


class Doubling(eqx.Module):
    """A convolution block, a transposed 4x4 convolution that doubles the sides, batch norm and ReLU."""

    block: ConvBlock
    up: ConvTranspose
    norm: BatchNorm | FrozenBatchNorm

    def __init__(self, in_channels: int, width: int, *, conv: Convolution, norm: Norm, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.block = ConvBlock(in_channels, width, conv=conv, norm=norm, key=keys[0])
        self.up = ConvTranspose(width, width, 4, stride=2, padding=1, use_bias=False, key=keys[1])
        self.norm = BatchNorm(width) if norm == "batch" else FrozenBatchNorm(width)

    def __call__(
        self, x: Float[Array, "b h w i"], state: eqx.nn.State, *, train: bool
    ) -> tuple[Float[Array, "b h2 w2 o"], eqx.nn.State]:
        y, state = self.block(x, state, train=train)
        y, state = self.norm(self.up(y), state, train=train)
        return jax.nn.relu(y), state


class DeconvUp(eqx.Module):
    """The last map of a backbone doubled once for each of ``widths``: stride 32 to 4 for three.

    Built from ``channels`` and ``strides`` of the backbone. ``conv`` is ``deformable`` in CenterNet's weights.
    """

    levels: tuple[Doubling, ...]
    in_channels: tuple[int, ...] = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        *,
        widths: tuple[int, ...] = (256, 128, 64),
        conv: Convolution = "deformable",
        norm: Norm = "batch",
        key: PRNGKeyArray,
    ):
        stride = check_levels("DeconvUp", channels, strides, len(channels) - 1).strides[0] >> len(widths)
        if not widths or stride < 1:
            raise ValueError(f"DeconvUp: a map of stride {strides[-1]} cannot be doubled {len(widths)} times")
        pairs = zip(itertools.pairwise((channels[-1], *widths)), jax.random.split(key, len(widths)), strict=True)
        self.levels = tuple(Doubling(i, o, conv=conv, norm=norm, key=k) for (i, o), k in pairs)
        self.in_channels = channels
        self.channels = widths[-1:]
        self.strides = (stride,)

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        del key
        check_features("DeconvUp", features, self.in_channels)
        x = features[-1]
        for level in self.levels:
            x, state = level(x, state, train=train)
        return (x,), state
