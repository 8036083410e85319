"""Stacked hourglasses (Newell et al. 2016) in CornerNet's form (Law and Deng 2018), CenterNet's Hourglass-104."""

from typing import NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.checks import check_images, check_layer
from eqvision.backbones.resnet import ConvNorm, Norm, ResidualBlock
from eqvision.types import Features, Images

Map = Float[Array, "b h w c"]
Blocks = tuple[ResidualBlock, ...]


class HourglassSize(NamedTuple):
    """Channels and residual blocks of each of the depths, outermost first; ``width`` is that of the outputs."""

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    stem: int = 128
    width: int = 256


# Law and Deng 2018, section 3.5: five halvings; two of them stacked have 104 layers.
HOURGLASS_104 = HourglassSize((256, 256, 384, 384, 384, 512), (2, 2, 2, 2, 2, 4))


class Hourglass(eqx.Module):
    """Blocks at the map's size, added to blocks at half of it around another hourglass or, innermost, more blocks."""

    up: Blocks
    down: Blocks
    inner: "Hourglass | Blocks"
    back: Blocks

    def __init__(self, channels: tuple[int, ...], blocks: tuple[int, ...], *, norm: Norm, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        (here, below), count = channels[:2], blocks[0]
        self.up = _blocks([here] * (count + 1), 1, norm, key=keys[0])
        self.down = _blocks([here, *[below] * count], 2, norm, key=keys[1])
        if len(channels) > 2:
            self.inner = Hourglass(channels[1:], blocks[1:], norm=norm, key=keys[2])
        else:
            self.inner = _blocks([below] * (blocks[1] + 1), 1, norm, key=keys[2])
        self.back = _blocks([*[below] * count, here], 1, norm, key=keys[3])

    def __call__(self, x: Map, state: eqx.nn.State, *, train: bool) -> tuple[Map, eqx.nn.State]:
        up, state = _run(self.up, x, state, train)
        y, state = _run(self.down, x, state, train)
        if isinstance(self.inner, Hourglass):
            y, state = self.inner(y, state, train=train)
        else:
            y, state = _run(self.inner, y, state, train)
        y, state = _run(self.back, y, state, train)
        # Cropped where a side is odd; the original takes only sides that five halvings divide.
        y = y.repeat(2, axis=1).repeat(2, axis=2)[:, : x.shape[1], : x.shape[2]]
        return up + y, state


class Link(eqx.Module):
    """From one hourglass to the next: what went into it and what came out, each by a 1x1 convolution, and a block."""

    before: ConvNorm
    after: ConvNorm
    block: ResidualBlock

    def __init__(self, size: HourglassSize, *, norm: Norm, key: PRNGKeyArray):
        keys, inside = jax.random.split(key, 3), size.channels[0]
        self.before = ConvNorm(inside, inside, 1, norm=norm, key=keys[0])
        self.after = ConvNorm(size.width, inside, 1, norm=norm, key=keys[1])
        self.block = _block(inside, inside, 1, norm, key=keys[2])

    def __call__(
        self, x: Map, output: Float[Array, "b h w o"], state: eqx.nn.State, *, train: bool
    ) -> tuple[Map, eqx.nn.State]:
        x, state = self.before(x, state, train=train)
        y, state = self.after(output, state, train=train)
        return self.block(jax.nn.relu(x + y), state, train=train)


class StackedHourglass(eqx.Module):
    """A stem of stride 4 and hourglasses one after the other; gives one map of stride 4 for each.

    The last map is the result; the others are for losses in training, and without those the compiler leaves out
    nothing, for each hourglass reads the one before. Images of any size are legal.
    """

    stem: ConvNorm
    stem_block: ResidualBlock
    hourglasses: tuple[Hourglass, ...]
    outputs: tuple[ConvNorm, ...]
    links: tuple[Link, ...]
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        size: HourglassSize,
        stacks: int = 2,
        *,
        in_channels: int = 3,
        norm: Norm = "batch",
        key: PRNGKeyArray,
    ):
        _check_size(size, stacks)
        keys, inside = jax.random.split(key, 5), size.channels[0]
        self.stem = ConvNorm(in_channels, size.stem, 7, stride=2, norm=norm, key=keys[0])
        self.stem_block = _block(size.stem, inside, 2, norm, key=keys[1])
        each = [[jax.random.fold_in(k, i) for i in range(stacks)] for k in keys[2:]]
        self.hourglasses = tuple(Hourglass(size.channels, size.blocks, norm=norm, key=k) for k in each[0])
        self.outputs = tuple(ConvNorm(inside, size.width, 3, norm=norm, key=k) for k in each[1])
        self.links = tuple(Link(size, norm=norm, key=k) for k in each[2][1:])
        self.in_channels = in_channels
        self.channels = (size.width,) * stacks
        self.strides = (4,) * stacks

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        del key
        check_images(images, self.in_channels)
        x, state = self.stem(images, state, train=train)
        x, state = self.stem_block(jax.nn.relu(x), state, train=train)
        maps = []
        for i, (hourglass, output) in enumerate(zip(self.hourglasses, self.outputs, strict=True)):
            if i:
                x, state = self.links[i - 1](x, maps[-1], state, train=train)
            y, state = hourglass(x, state, train=train)
            y, state = output(y, state, train=train)
            maps.append(jax.nn.relu(y))
        return tuple(maps), state

    def intermediates(self, images: Images, state: eqx.nn.State, layers: tuple[int, ...]) -> Features:
        """Maps of the hourglasses ``layers``; negative counts from the end."""
        features, _ = self(images, state)
        return tuple(features[check_layer(layer, len(features))] for layer in layers)


def _block(in_channels: int, out_channels: int, stride: int, norm: Norm, *, key: PRNGKeyArray) -> ResidualBlock:
    widths, kernels, strides = (out_channels, out_channels), (3, 3), (stride, 1)
    return ResidualBlock(
        in_channels, widths, kernels, strides, shortcut="projection", zero_scale=False, norm=norm, key=key
    )


def _blocks(channels: list[int], stride: int, norm: Norm, *, key: PRNGKeyArray) -> Blocks:
    """Blocks from each of the channels to the next; the stride is the first one's."""
    return tuple(
        _block(channels[i], channels[i + 1], 1 if i else stride, norm, key=jax.random.fold_in(key, i))
        for i in range(len(channels) - 1)
    )


def _run(blocks: Blocks, x: Map, state: eqx.nn.State, train: bool) -> tuple[Float[Array, "b h2 w2 o"], eqx.nn.State]:
    for block in blocks:
        x, state = block(x, state, train=train)
    return x, state


def _check_size(size: HourglassSize, stacks: int) -> None:
    if len(size.channels) != len(size.blocks) or len(size.channels) < 2:
        raise ValueError(
            f"an hourglass has channels and blocks for each of its depths, of which there are 2 or more; got channels "
            f"{size.channels} and blocks {size.blocks}"
        )
    if stacks < 1:
        raise ValueError(f"stacks {stacks} is no number of hourglasses; give 1 or more")


def hourglass_104(*, in_channels: int = 3, norm: Norm = "batch", key: PRNGKeyArray) -> StackedHourglass:
    """Two hourglasses of five halvings each, as in CornerNet and CenterNet."""
    return StackedHourglass(HOURGLASS_104, 2, in_channels=in_channels, norm=norm, key=key)
