"""DLA's upsampling (Yu et al. 2018) as CenterNet has it (Zhou et al. 2019): coarse maps are added into fine ones."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.resnet import Norm
from eqvision.layers import ConvTranspose, bilinear_upsampling
from eqvision.necks.checks import check_features, check_levels
from eqvision.necks.conv_block import ConvBlock, Convolution
from eqvision.types import Features

Map = Float[Array, "b h w c"]


class Join(eqx.Module):
    """A map convolved and upsampled, added to a finer one, and convolved again; linear interpolation at the start."""

    project: ConvBlock
    up: ConvTranspose
    node: ConvBlock

    def __init__(self, in_channels: int, width: int, factor: int, *, conv: Convolution, norm: Norm, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.project = ConvBlock(in_channels, width, conv=conv, norm=norm, key=keys[0])
        self.up = ConvTranspose(
            width,
            width,
            2 * factor,
            stride=factor,
            padding=factor // 2,
            groups=width,
            use_bias=False,
            init=bilinear_upsampling,
            key=keys[1],
        )
        self.node = ConvBlock(width, width, conv=conv, norm=norm, key=keys[2])

    def __call__(
        self, x: Float[Array, "b h2 w2 i"], fine: Map, state: eqx.nn.State, *, train: bool
    ) -> tuple[Map, eqx.nn.State]:
        y, state = self.project(x, state, train=train)
        return self.node(self.up(y) + fine, state, train=train)


class DLAUp(eqx.Module):
    """Maps of strides 4 to 32 joined again and again until one of stride 4 has seen them all.

    Built from ``channels`` and ``strides`` of a backbone, whose maps before ``first_level`` it leaves out. ``rounds``
    join the coarsest maps with the next finer, one level more each time, and each leaves a map at its finest level;
    ``last`` joins those, but the coarsest, which it leaves out. ``conv`` is ``deformable`` in the published weights.
    Each side must be twice that of the next map, as it is with ``DLA``. Raises ValueError for strides that do not
    double, and where there are fewer than two maps.
    """

    rounds: tuple[tuple[Join, ...], ...]
    last: tuple[Join, ...]
    first_level: int = eqx.field(static=True)
    in_channels: tuple[int, ...] = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        *,
        first_level: int = 2,
        conv: Convolution = "deformable",
        norm: Norm = "batch",
        key: PRNGKeyArray,
    ):
        widths = check_levels("DLAUp", channels, strides, first_level).channels
        count = len(widths)
        if count < 2:
            raise ValueError(f"DLAUp: it joins two maps or more, and from first_level {first_level} there is one")

        def joins(inputs: list[int], width: int, factors: list[int], number: int) -> tuple[Join, ...]:
            keys = jax.random.split(jax.random.fold_in(key, number), len(inputs))
            triples = zip(inputs, factors, keys, strict=True)
            return tuple(Join(i, width, f, conv=conv, norm=norm, key=k) for i, f, k in triples)

        # Round i joins the levels behind ``fine`` to it; all but the first have its predecessor's width by then.
        rounds = []
        for i in range(count - 1):
            fine = count - 2 - i
            inputs = [widths[fine + 1]] * (i + 1)
            rounds.append(joins(inputs, widths[fine], [2] * (i + 1), i))
        self.rounds = tuple(rounds)
        kept = widths[1 : count - 1]
        self.last = joins(list(kept), widths[0], [2 << i for i in range(len(kept))], count)
        self.first_level = first_level
        self.in_channels = channels
        self.channels = (widths[0],)
        self.strides = (strides[first_level],)

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        del key
        check_features("DLAUp", features, self.in_channels)
        maps = list(features[self.first_level :])
        results = [maps[-1]]
        for joins in self.rounds:
            first = len(maps) - len(joins) - 1
            maps[first:], state = _joined(joins, maps[first:], state, train)
            results.insert(0, maps[-1])
        joined, state = _joined(self.last, results[: 1 + len(self.last)], state, train)
        return (joined[-1],), state


def _joined(joins: tuple[Join, ...], maps: list[Float[Array, "b _ _ _"]], state: eqx.nn.State, train: bool):
    """The first map, and each other joined to the result of the one before it."""
    results = maps[:1]
    for join, x in zip(joins, maps[1:], strict=True):
        y, state = join(x, results[-1], state, train=train)
        results.append(y)
    return results, state
