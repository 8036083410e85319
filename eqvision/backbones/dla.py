"""Deep layer aggregation (Yu et al. 2018), CenterNet's backbone: stages are trees whose roots read all subtrees."""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.checks import check_images, check_layer
from eqvision.backbones.resnet import ConvNorm, Norm
from eqvision.layers import max_pool
from eqvision.types import Features, Images

Map = Float[Array, "b h w c"]


class DLASize(NamedTuple):
    """Convolutions of the two first stages and levels of the trees of the others, and channels of all six."""

    levels: tuple[int, int, int, int, int, int]
    channels: tuple[int, int, int, int, int, int]


# Yu et al. 2018, table 1; stages of basic blocks.
DLA_SIZES = {"34": DLASize((1, 1, 1, 2, 2, 1), (16, 32, 64, 128, 256, 512))}


class BasicBlock(eqx.Module):
    """Two 3x3 convolutions added to ``shortcut``, which the tree above makes where the shape changes."""

    conv1: ConvNorm
    conv2: ConvNorm

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, norm: Norm, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.conv1 = ConvNorm(in_channels, out_channels, 3, stride=stride, norm=norm, key=keys[0])
        self.conv2 = ConvNorm(out_channels, out_channels, 3, norm=norm, key=keys[1])

    def __call__(self, x: Map, shortcut: Float[Array, "b h2 w2 o"], state: eqx.nn.State, *, train: bool):
        y, state = self.conv1(x, state, train=train)
        y, state = self.conv2(jax.nn.relu(y), state, train=train)
        return jax.nn.relu(y + shortcut), state


class Leaf(eqx.Module):
    """The lowest level of a tree: two blocks and their root, a 1x1 convolution over outputs side by side.

    These are those of the second block, of the first, and what the trees above hand down; with ``level_root`` the
    pooled input too. ``handed_down`` is the number of channels of those.
    """

    block1: BasicBlock
    block2: BasicBlock
    root: ConvNorm
    projection: ConvNorm | None
    stride: int = eqx.field(static=True)
    level_root: bool = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        level_root: bool = False,
        handed_down: int = 0,
        norm: Norm,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 4)
        read = 2 * out_channels + handed_down + (in_channels if level_root else 0)
        project = in_channels != out_channels
        self.block1 = BasicBlock(in_channels, out_channels, stride=stride, norm=norm, key=keys[0])
        self.block2 = BasicBlock(out_channels, out_channels, stride=1, norm=norm, key=keys[1])
        self.root = ConvNorm(read, out_channels, 1, norm=norm, key=keys[2])
        self.projection = ConvNorm(in_channels, out_channels, 1, norm=norm, key=keys[3]) if project else None
        self.stride = stride
        self.level_root = level_root

    def __call__(
        self, x: Map, state: eqx.nn.State, *, train: bool, handed_down: Features = ()
    ) -> tuple[Float[Array, "b h2 w2 o"], eqx.nn.State]:
        bottom = _pooled(x, self.stride)
        shortcut = bottom
        if self.projection is not None:
            shortcut, state = self.projection(bottom, state, train=train)
        first, state = self.block1(x, shortcut, state, train=train)
        second, state = self.block2(first, first, state, train=train)
        children = [second, first, *handed_down, *([bottom] if self.level_root else [])]
        y, state = self.root(jnp.concatenate(children, axis=-1), state, train=train)
        return jax.nn.relu(y), state


class Tree(eqx.Module):
    """Two subtrees, the second of which reads the first, and whose roots read the first's too.

    The original has projections here too whose result nothing reads; they are left out, as in timm.
    """

    tree1: "Tree | Leaf"
    tree2: "Tree | Leaf"
    stride: int = eqx.field(static=True)
    level_root: bool = eqx.field(static=True)

    def __init__(
        self,
        levels: int,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        level_root: bool = False,
        handed_down: int = 0,
        norm: Norm,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key)
        handed_down += out_channels + (in_channels if level_root else 0)
        self.tree1 = _tree(levels - 1, in_channels, out_channels, stride=stride, norm=norm, key=keys[0])
        self.tree2 = _tree(levels - 1, out_channels, out_channels, handed_down=handed_down, norm=norm, key=keys[1])
        self.stride = stride
        self.level_root = level_root

    def __call__(
        self, x: Map, state: eqx.nn.State, *, train: bool, handed_down: Features = ()
    ) -> tuple[Float[Array, "b h2 w2 o"], eqx.nn.State]:
        bottom = (_pooled(x, self.stride),) if self.level_root else ()
        y, state = self.tree1(x, state, train=train)
        return self.tree2(y, state, train=train, handed_down=(*handed_down, *bottom, y))


def _pooled(x: Map, stride: int) -> Float[Array, "b h2 w2 c"]:
    return max_pool(x, stride, stride=stride) if stride > 1 else x


def _tree(
    levels: int,
    in_channels: int,
    out_channels: int,
    *,
    stride: int = 1,
    level_root: bool = False,
    handed_down: int = 0,
    norm: Norm,
    key: PRNGKeyArray,
) -> Tree | Leaf:
    build = Leaf if levels == 1 else functools.partial(Tree, levels)
    return build(
        in_channels,
        out_channels,
        stride=stride,
        level_root=level_root,
        handed_down=handed_down,
        norm=norm,
        key=key,
    )


class DLA(eqx.Module):
    """A 7x7 convolution, two stages of convolutions and four of trees; gives all six maps, of strides 1 to 32.

    Height and width must be multiples of 32: trees join maps that were pooled and maps that were convolved.
    """

    base: ConvNorm
    convs: tuple[tuple[ConvNorm, ...], tuple[ConvNorm, ...]]
    trees: tuple[Tree | Leaf, ...]
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, size: DLASize, *, in_channels: int = 3, norm: Norm = "batch", key: PRNGKeyArray):
        keys, channels = jax.random.split(key, 7), size.channels
        self.base = ConvNorm(in_channels, channels[0], 7, norm=norm, key=keys[0])
        self.convs = (
            _convolutions(size.levels[0], channels[0], channels[0], 1, norm, key=keys[1]),
            _convolutions(size.levels[1], channels[0], channels[1], 2, norm, key=keys[2]),
        )
        tree = functools.partial(_tree, stride=2, norm=norm)
        self.trees = tuple(
            tree(size.levels[i], channels[i - 1], channels[i], level_root=i > 2, key=keys[i + 1]) for i in range(2, 6)
        )
        self.in_channels = in_channels
        self.channels = channels
        self.strides = (1, 2, 4, 8, 16, 32)

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        del key
        check_images(images, self.in_channels, (self.strides[-1], self.strides[-1]))
        x, state = self.base(images, state, train=train)
        x, features = jax.nn.relu(x), []
        for convs in self.convs:
            for conv in convs:
                x, state = conv(x, state, train=train)
                x = jax.nn.relu(x)
            features.append(x)
        for tree in self.trees:
            x, state = tree(x, state, train=train)
            features.append(x)
        return tuple(features), state

    def intermediates(self, images: Images, state: eqx.nn.State, layers: tuple[int, ...]) -> Features:
        """Maps of the stages ``layers``; negative counts from the end."""
        features, _ = self(images, state)
        return tuple(features[check_layer(layer, len(features))] for layer in layers)


def _convolutions(count: int, in_channels: int, out_channels: int, stride: int, norm: Norm, *, key: PRNGKeyArray):
    widths = [in_channels, *[out_channels] * count]
    return tuple(
        ConvNorm(widths[i], widths[i + 1], 3, stride=1 if i else stride, norm=norm, key=jax.random.fold_in(key, i))
        for i in range(count)
    )


def dla(size: str = "34", *, in_channels: int = 3, norm: Norm = "batch", key: PRNGKeyArray) -> DLA:
    """DLA of a named size: 34, the one that CenterNet takes. Raises ValueError for another."""
    if size not in DLA_SIZES:
        raise ValueError(f"DLA size {size!r} does not exist; choose from {', '.join(DLA_SIZES)}")
    return DLA(DLA_SIZES[size], in_channels=in_channels, norm=norm, key=key)
