"""BiT (Kolesnikov et al. 2020): ResNet v2 with group norm and standardised weights."""

import functools
from collections.abc import Callable
from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.checks import check_images, check_layer
from eqvision.layers import GroupNorm, Remat, StandardizedConv, max_pool, rematerialised
from eqvision.types import Features, Images

Block = Callable[[Float[Array, "b h w i"]], Float[Array, "b h2 w2 o"]]


class Stage(eqx.Module):
    """A block that changes shape, then equal blocks with stacked parameters, run by ``lax.scan``.

    ``unroll`` blocks are compiled one after the other per iteration, True means all: XLA:CPU's gradients of
    a 3x3 convolution are fifty times slower inside a loop. Where compile time matters more, as for 36 blocks
    on an accelerator, give 1. ``remat`` is that of ``TransformerStack`` and saves memory only with a loop.
    """

    first: Block
    rest: Block | None
    depth: int = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    unroll: int | bool = eqx.field(static=True)

    def __init__(
        self,
        first: Block,
        build: Callable[[PRNGKeyArray], Block],
        depth: int,
        *,
        remat: Remat = "none",
        unroll: int | bool = True,
        key: PRNGKeyArray,
    ):
        if remat not in get_args(Remat):
            raise ValueError(f"remat {remat!r} is unknown; choose from {get_args(Remat)}")
        self.first = first
        self.rest = eqx.filter_vmap(build)(jax.random.split(key, depth - 1)) if depth > 1 else None
        self.depth = depth
        self.remat = remat
        self.unroll = unroll

    def __call__(self, x: Float[Array, "b h w i"], *, train: bool = False) -> Float[Array, "b h2 w2 o"]:
        x = self.first(x)
        if self.rest is None:
            return x
        run = rematerialised(lambda y, block: block(y), self.remat if train else "none")
        return lax.scan(lambda y, block: (run(y, block), None), x, self.rest, unroll=self.unroll)[0]


def bottleneck_stages(
    block: Callable[..., Block],
    blocks: tuple[int, ...],
    width: int,
    *,
    remat: Remat = "none",
    unroll: int | bool = True,
    key: PRNGKeyArray,
) -> tuple[Stage, ...]:
    """``blocks[i]`` bottlenecks of inner width ``width * 2**i``; all stages but the first halve the map."""
    stages, channels = [], width
    for i, depth in enumerate(blocks):
        keys = jax.random.split(jax.random.fold_in(key, i))
        inner, outer = width * 2**i, 4 * width * 2**i
        first = block(channels, inner, stride=2 if i else 1, key=keys[0])
        another = functools.partial(_build, block, outer, inner)
        stages.append(Stage(first, another, depth, remat=remat, unroll=unroll, key=keys[1]))
        channels = outer
    return tuple(stages)


def _build(block: Callable[..., Block], in_channels: int, width: int, key: PRNGKeyArray) -> Block:
    return block(in_channels, width, key=key)


class PreActivationBlock(eqx.Module):
    """Bottleneck with norm and ReLU before each convolution; the projection reads the first ReLU's output."""

    norm1: GroupNorm
    conv1: StandardizedConv
    norm2: GroupNorm
    conv2: StandardizedConv
    norm3: GroupNorm
    conv3: StandardizedConv
    projection: StandardizedConv | None

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        num_groups: int = 32,
        conv_eps: float = 1e-10,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 4)
        conv = functools.partial(StandardizedConv, eps=conv_eps)
        self.norm1 = GroupNorm(in_channels, num_groups=num_groups)
        self.conv1 = conv(in_channels, width, 1, key=keys[0])
        self.norm2 = GroupNorm(width, num_groups=num_groups)
        self.conv2 = conv(width, width, 3, stride=stride, padding=1, key=keys[1])
        self.norm3 = GroupNorm(width, num_groups=num_groups)
        self.conv3 = conv(width, 4 * width, 1, key=keys[2])
        changes = stride > 1 or in_channels != 4 * width
        self.projection = conv(in_channels, 4 * width, 1, stride=stride, key=keys[3]) if changes else None

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        y = jax.nn.relu(self.norm1(x))
        shortcut = x if self.projection is None else self.projection(y)
        y = self.conv1(y)
        y = self.conv2(jax.nn.relu(self.norm2(y)))
        y = self.conv3(jax.nn.relu(self.norm3(y)))
        return shortcut + y


class BiT(eqx.Module):
    """Stem, stages of pre-activation bottlenecks, norm and ReLU on the last map; any image size is legal.

    ``width`` is the stem's, 64 times the width factor. ``conv_eps`` is added to the variance of the weights:
    1e-10 in google-research/big_transfer, 1e-8 in timm and transformers.
    """

    stem: StandardizedConv
    stages: tuple[Stage, ...]
    norm: GroupNorm
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int = 64,
        *,
        in_channels: int = 3,
        num_groups: int = 32,
        conv_eps: float = 1e-10,
        remat: Remat = "none",
        unroll: int | bool = True,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key)
        self.stem = StandardizedConv(in_channels, width, 7, stride=2, padding=3, eps=conv_eps, key=keys[0])
        block = functools.partial(PreActivationBlock, num_groups=num_groups, conv_eps=conv_eps)
        self.stages = bottleneck_stages(block, blocks, width, remat=remat, unroll=unroll, key=keys[1])
        self.in_channels = in_channels
        self.channels = tuple(4 * width * 2**i for i in range(len(blocks)))
        self.norm = GroupNorm(self.channels[-1], num_groups=num_groups)
        self.strides = tuple(4 * 2**i for i in range(len(blocks)))

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        del key
        check_images(images, self.in_channels)
        # Zeros take part in the maximum here, unlike in a padded pooling: there is no ReLU before it.
        x = jnp.pad(self.stem(images), ((0, 0), (1, 1), (1, 1), (0, 0)))
        x, features = max_pool(x, 3, stride=2), []
        for stage in self.stages:
            x = stage(x, train=train)
            features.append(x)
        return (*features[:-1], jax.nn.relu(self.norm(x))), state

    def intermediates(self, images: Images, state: eqx.nn.State, layers: tuple[int, ...]) -> Features:
        """Maps of the stages ``layers``; negative counts from the end."""
        features, _ = self(images, state)
        return tuple(features[check_layer(layer, len(features))] for layer in layers)


# Blocks of each stage: He et al. 2016, table 1.
BIT_DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def bit(
    depth: int,
    width_factor: int = 1,
    *,
    in_channels: int = 3,
    conv_eps: float = 1e-10,
    remat: Remat = "none",
    unroll: int | bool = True,
    key: PRNGKeyArray,
) -> BiT:
    """BiT-R``depth``x``width_factor``; published are R50x1, R50x3, R101x1, R101x3, R152x2 and R152x4.

    ``conv_eps`` is that of ``BiT``.
    """
    if depth not in BIT_DEPTHS:
        raise ValueError(f"BiT of depth {depth} does not exist; choose from {', '.join(map(str, BIT_DEPTHS))}")
    blocks, width = BIT_DEPTHS[depth], 64 * width_factor
    return BiT(blocks, width, in_channels=in_channels, conv_eps=conv_eps, remat=remat, unroll=unroll, key=key)
