"""Axial-ResNet (Wang et al. 2020): a ResNet with attention along height and width in place of 3x3 windows."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.bit import BIT_DEPTHS, Stage
from eqvision.backbones.checks import check_images, check_layer, legal_size
from eqvision.layers import (
    GroupNorm,
    Linear,
    Remat,
    StandardizedConv,
    average_pool,
    max_pool,
    normal,
    resample_grid,
)
from eqvision.types import Features, Images

EPS = 1e-4  # of every group norm in Scenic's Axial-ResNet


class AxialAttention(eqx.Module):
    """Self-attention within each column or row, with learned relative positions (Wang et al. 2020, eq. 4).

    ``positions`` has one vector for each distance from ``1 - length`` to ``length - 1``, shared by the heads:
    a part for keys, a part for queries, a part that joins the values. It is resampled where the map is
    longer or shorter. As in Scenic, queries and keys are half as wide as values, logits are not scaled, and
    group norm sees one line at a time. Memory grows with height * width * (height + width).
    """

    qkv: Linear
    qkv_norm: GroupNorm
    positions: Float[Array, "p d"]
    out_norm: GroupNorm
    axis: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        axis: int,
        length: int,
        *,
        num_heads: int = 8,
        num_groups: int = 32,
        key: PRNGKeyArray,
    ):
        if channels % (2 * num_heads):
            raise ValueError(
                f"AxialAttention: {channels} channels cannot be split into {num_heads} heads of even width"
            )
        keys, head_width = jax.random.split(key), channels // num_heads
        init = functools.partial(normal, std=1 / channels)
        self.qkv = Linear(channels, 2 * channels, use_bias=False, init=init, key=keys[0])
        self.qkv_norm = GroupNorm(2 * channels, num_groups=num_groups, eps=EPS)
        self.positions = normal(keys[1], (2 * length - 1, 2 * head_width), 1 / head_width)
        self.out_norm = GroupNorm(channels, num_groups=num_groups, eps=EPS)
        self.axis = axis
        self.num_heads = num_heads

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Attention along ``axis`` of the map: 1 is within columns, 2 within rows."""
        across = x.swapaxes(1, 2) if self.axis == 1 else x
        lines = across.reshape(-1, *across.shape[2:])
        mixed = self.out_norm(self._attend(self.qkv_norm(self.qkv(lines)))).reshape(across.shape)
        return mixed.swapaxes(1, 2) if self.axis == 1 else mixed

    def _attend(self, qkv: Float[Array, "r n k"]) -> Float[Array, "r n c"]:
        r, n, _ = qkv.shape
        query, key, value = _split(qkv.reshape(r, n, self.num_heads, -1))
        for_key, for_query, for_value = _split(self._relative(n).astype(qkv.dtype))
        logits = (
            jnp.einsum("rqhd,rkhd->rhqk", query, key)
            + jnp.einsum("rqhd,qkd->rhqk", query, for_query)
            + jnp.einsum("rkhd,qkd->rhqk", key, for_key)
        )
        wide = jnp.promote_types(qkv.dtype, jnp.float32)
        weights = jax.nn.softmax(logits.astype(wide), axis=-1).astype(qkv.dtype)
        mixed = jnp.einsum("rhqk,rkhd->rqhd", weights, value) + jnp.einsum("rhqk,qkd->rqhd", weights, for_value)
        return mixed.reshape(r, n, -1)

    def _relative(self, length: int) -> Float[Array, "n n d"]:
        table = resample_grid(self.positions[:, None], (2 * length - 1, 1))[:, 0]
        place = np.arange(length)
        return table[place[None, :] - place[:, None] + length - 1]


def _split(
    x: Float[Array, "... d"],
) -> tuple[Float[Array, "... q"], Float[Array, "... q"], Float[Array, "... v"]]:
    """A quarter, a quarter and a half of the last axis."""
    half = x.shape[-1] // 2
    return x[..., : half // 2], x[..., half // 2 : half], x[..., half:]


class AxialBlock(eqx.Module):
    """Bottleneck with a column and a row attention in the middle, mean-pooled where the stride is 2."""

    conv1: StandardizedConv
    norm1: GroupNorm
    height_attention: AxialAttention
    width_attention: AxialAttention
    conv2: StandardizedConv
    norm2: GroupNorm
    projection: StandardizedConv | None
    projection_norm: GroupNorm | None
    stride: int = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        width: int,
        grid: tuple[int, int],
        *,
        stride: int = 1,
        num_heads: int = 8,
        num_groups: int = 32,
        key: PRNGKeyArray,
    ):
        keys, out_channels = jax.random.split(key, 5), 4 * width
        norm = functools.partial(GroupNorm, num_groups=num_groups, eps=EPS)
        attention = functools.partial(AxialAttention, width, num_heads=num_heads, num_groups=num_groups)
        self.conv1 = StandardizedConv(in_channels, width, 1, key=keys[0])
        self.norm1 = norm(width)
        self.height_attention = attention(1, grid[0], key=keys[1])
        self.width_attention = attention(2, grid[1], key=keys[2])
        self.conv2 = StandardizedConv(width, out_channels, 1, key=keys[3])
        self.norm2 = norm(out_channels, weight_init=0.0)  # the block starts as its shortcut
        changes = stride > 1 or in_channels != out_channels
        self.projection = (
            StandardizedConv(in_channels, out_channels, 1, stride=stride, key=keys[4]) if changes else None
        )
        self.projection_norm = norm(out_channels) if changes else None
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = self.width_attention(self.height_attention(y))
        y = average_pool(y, self.stride, stride=self.stride) if self.stride > 1 else y
        y = self.norm2(self.conv2(jax.nn.relu(y)))
        if self.projection is not None and self.projection_norm is not None:
            x = self.projection_norm(self.projection(x))
        return jax.nn.relu(x + y)


class AxialResNet(eqx.Module):
    """Stem of stride 4 and stages of axial blocks; returns the map of every stage, fine to coarse.

    Images of any height and width that the last stride divides are legal: relative positions are resampled.
    """

    stem: StandardizedConv
    stem_norm: GroupNorm
    stages: tuple[Stage, ...]
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int = 64,
        *,
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        num_heads: int = 8,
        num_groups: int = 32,
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        self.in_channels = in_channels
        self.channels = tuple(4 * width * 2**i for i in range(len(blocks)))
        self.strides = tuple(4 * 2**i for i in range(len(blocks)))
        height, width_px = legal_size(image_size, self.strides[-1])
        grid = (height // 4, width_px // 4)
        keys = jax.random.split(key, len(blocks) + 1)
        self.stem = StandardizedConv(in_channels, width, 7, stride=2, key=keys[-1])
        self.stem_norm = GroupNorm(width, num_groups=num_groups, eps=EPS)
        block = functools.partial(AxialBlock, num_heads=num_heads, num_groups=num_groups)
        stages, channels = [], width
        for i, depth in enumerate(blocks):
            first_key, rest_key = jax.random.split(keys[i])
            # A block that halves the map attends before it does so.
            before = (grid[0] >> max(0, i - 1), grid[1] >> max(0, i - 1))
            first = block(channels, width * 2**i, before, stride=2 if i else 1, key=first_key)
            another = functools.partial(_build, block, self.channels[i], width * 2**i, (grid[0] >> i, grid[1] >> i))
            stages.append(Stage(first, another, depth, remat=remat, unroll=unroll, key=rest_key))
            channels = self.channels[i]
        self.stages = tuple(stages)

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        del key
        check_images(images, self.in_channels, (self.strides[-1], self.strides[-1]))
        x = jax.nn.relu(self.stem_norm(self.stem(images)))
        x, features = max_pool(x, 3, stride=2, padding="SAME"), []
        for stage in self.stages:
            x = stage(x, train=train)
            features.append(x)
        return tuple(features), state

    def intermediates(self, images: Images, state: eqx.nn.State, layers: tuple[int, ...]) -> Features:
        """Maps of the stages ``layers``; negative counts from the end."""
        features, _ = self(images, state)
        return tuple(features[check_layer(layer, len(features))] for layer in layers)


def _build(block, in_channels: int, width: int, grid: tuple[int, int], key: PRNGKeyArray) -> AxialBlock:
    return block(in_channels, width, grid, key=key)


# Blocks of each stage: those of a ResNet, and Scenic's smaller one.
AXIAL_DEPTHS = {26: (2, 2, 2, 2), **BIT_DEPTHS}


def axial_resnet(
    depth: int,
    *,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> AxialResNet:
    """Axial-ResNet of ``depth`` 26, 50, 101 or 152 with 8 heads, as Scenic trains it.

    ``image_size`` sets the number of learned positions.
    """
    if depth not in AXIAL_DEPTHS:
        raise ValueError(
            f"Axial-ResNet of depth {depth} does not exist; choose from {', '.join(map(str, AXIAL_DEPTHS))}"
        )
    return AxialResNet(
        AXIAL_DEPTHS[depth],
        image_size=image_size,
        in_channels=in_channels,
        remat=remat,
        unroll=unroll,
        key=key,
    )
