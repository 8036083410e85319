"""Hybrid ViT (Dosovitskiy et al. 2021, Steiner et al. 2021): a vision transformer on the map of a ResNet stem."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.bit import Block, Stage
from eqvision.backbones.checks import check_images
from eqvision.backbones.vit import SIZES, VisionTransformer
from eqvision.layers import GroupNorm, Implementation, Remat, StandardizedConv, max_pool
from eqvision.types import Images, TokenFeatures


class StandardizedConvNorm(eqx.Module):
    """A standardised convolution, padded as TensorFlow does, and its group norm."""

    conv: StandardizedConv
    norm: GroupNorm

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        num_groups: int = 32,
        conv_eps: float = 1e-8,
        norm_eps: float = 1e-6,
        key: PRNGKeyArray,
    ):
        self.conv = StandardizedConv(in_channels, out_channels, kernel_size, stride=stride, eps=conv_eps, key=key)
        self.norm = GroupNorm(out_channels, num_groups=num_groups, eps=norm_eps)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        return self.norm(self.conv(x))


class PostActivationBlock(eqx.Module):
    """Bottleneck with the ReLU after each norm and after the sum; its last norm starts at zero."""

    conv1: StandardizedConvNorm
    conv2: StandardizedConvNorm
    conv3: StandardizedConvNorm
    projection: StandardizedConvNorm | None

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        num_groups: int = 32,
        conv_eps: float = 1e-8,
        norm_eps: float = 1e-6,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 4)
        conv = functools.partial(StandardizedConvNorm, num_groups=num_groups, conv_eps=conv_eps, norm_eps=norm_eps)
        self.conv1 = conv(in_channels, width, 1, key=keys[0])
        self.conv2 = conv(width, width, 3, stride=stride, key=keys[1])
        last = conv(width, 4 * width, 1, key=keys[2])
        self.conv3 = eqx.tree_at(lambda c: c.norm.weight, last, jnp.zeros(4 * width))
        changes = stride > 1 or in_channels != 4 * width
        self.projection = conv(in_channels, 4 * width, 1, stride=stride, key=keys[3]) if changes else None

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        y = jax.nn.relu(self.conv1(x))
        y = self.conv3(jax.nn.relu(self.conv2(y)))
        shortcut = x if self.projection is None else self.projection(x)
        return jax.nn.relu(shortcut + y)


class HybridStem(eqx.Module):
    """The root of a ResNet, stride 4, and its stages of ``blocks`` bottlenecks, each but the first of stride 2.

    ``blocks`` may be empty. google-research/vision_transformer adds 1e-5 to the standard deviation of the
    weights and ``norm_eps`` 1e-6 to the variance of the maps; timm and transformers, which this follows,
    add ``conv_eps`` 1e-8 to the variance of the weights, and 1e-5 in the norm.
    """

    root: StandardizedConvNorm
    stages: tuple[Stage, ...]
    in_channels: int = eqx.field(static=True)
    channels: int = eqx.field(static=True)
    stride: int = eqx.field(static=True)

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int = 64,
        *,
        in_channels: int = 3,
        num_groups: int = 32,
        conv_eps: float = 1e-8,
        norm_eps: float = 1e-5,
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, len(blocks) + 1)
        options = {"num_groups": num_groups, "conv_eps": conv_eps, "norm_eps": norm_eps}
        self.root = StandardizedConvNorm(in_channels, width, 7, stride=2, **options, key=keys[0])
        block = functools.partial(PostActivationBlock, **options)
        stages, channels = [], width
        for i, depth in enumerate(blocks):
            stages.append(_stage(block, channels, width * 2**i, 2 if i else 1, depth, remat, unroll, keys[i + 1]))
            channels = 4 * width * 2**i
        self.stages = tuple(stages)
        self.in_channels = in_channels
        self.channels = channels
        self.stride = 4 * 2 ** max(0, len(blocks) - 1)

    def __call__(self, images: Images, *, train: bool = False) -> Float[Array, "b h2 w2 d"]:
        x = max_pool(jax.nn.relu(self.root(images)), 3, stride=2, padding="SAME")
        for stage in self.stages:
            x = stage(x, train=train)
        return x
