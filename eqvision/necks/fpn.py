"""Feature pyramid network (Lin et al. 2017) in the dialects of torchvision, detectron2 and mmdet."""

import math
from typing import Literal, get_args

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers import max_pool, uniform
from eqvision.layers.normed_conv import NormedConv, NormKind
from eqvision.necks.checks import check_features, check_levels
from eqvision.ops import resize_nearest
from eqvision.types import Features

Dialect = Literal["torchvision", "detectron2", "mmdet"]
Extra = Literal["none", "pool", "p6p7_on_input", "p6p7_on_output"]
Map = Float[Array, "b h w c"]
Finer = Float[Array, "b h2 w2 c"]


class ExtraLevels(eqx.Module):
    """Two coarser levels by strided 3x3 convolutions, as in RetinaNet; ``relu`` before the second."""

    p6: NormedConv
    p7: NormedConv
    relu: bool = eqx.field(static=True)

    def __init__(self, in_channels: int, width: int, *, norm: NormKind, relu: bool, key: PRNGKeyArray):
        keys = jax.random.split(key)
        options = {"stride": 2, "norm": norm, "init": caffe2_xavier}
        self.p6 = NormedConv(in_channels, width, 3, **options, key=keys[0])
        self.p7 = NormedConv(width, width, 3, **options, key=keys[1])
        self.relu = relu

    def __call__(self, x: Map, state: eqx.nn.State, *, train: bool = False) -> tuple[Features, eqx.nn.State]:
        p6, state = self.p6(x, state, train=train)
        p7, state = self.p7(jax.nn.relu(p6) if self.relu else p6, state, train=train)
        return (p6, p7), state


class FPN(eqx.Module):
    """Each map by a 1x1 convolution, plus the next coarser sum doubled by nearest, then by a 3x3 convolution.

    Built from ``channels`` and ``strides`` of a backbone, whose maps before ``first_level`` it leaves out. Dialects:
    ``torchvision`` and ``mmdet`` upsample to the size of the finer map, whatever it is; ``detectron2`` exactly twice,
    so images must be padded to a multiple of the coarsest stride, and a ValueError says so.

    ``extra`` are levels behind the last: ``pool`` takes every second place of it (P6 of Faster R-CNN, for the
    proposals only), ``p6p7_on_input`` convolves the backbone's last map (RetinaNet), ``p6p7_on_output`` the last
    output (FCOS, CenterNet2; torchvision's RetinaNet v2 reads the backbone). mmdet has no ReLU between these two, and
    normalises them as the others, which torchvision and detectron2 never do.

    Raises ValueError for strides that do not double, and for names that are unknown.
    """

    laterals: tuple[NormedConv, ...]
    outputs: tuple[NormedConv, ...]
    extra: ExtraLevels | None
    pool: bool = eqx.field(static=True)
    on_input: bool = eqx.field(static=True)
    first_level: int = eqx.field(static=True)
    dialect: Dialect = eqx.field(static=True)
    in_channels: tuple[int, ...] = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        width: int = 256,
        *,
        dialect: Dialect = "torchvision",
        extra: Extra = "pool",
        norm: NormKind = "none",
        first_level: int = 0,
        key: PRNGKeyArray,
    ):
        _check_names(dialect, extra)
        read = check_levels("FPN", channels, strides, first_level)
        keys = jax.random.split(key, 2 * len(read.channels) + 1)
        options = {"norm": norm, "init": caffe2_xavier}
        pairs = list(zip(read.channels, keys[:-1:2], keys[1::2], strict=True))
        self.laterals = tuple(NormedConv(c, width, 1, **options, key=k) for c, k, _ in pairs)
        self.outputs = tuple(NormedConv(width, width, 3, **options, key=k) for _, _, k in pairs)
        self.pool = extra == "pool"
        self.on_input = extra == "p6p7_on_input"
        self.extra = None
        if extra.startswith("p6p7"):
            source = read.channels[-1] if self.on_input else width
            mmdet = dialect == "mmdet"
            self.extra = ExtraLevels(source, width, norm=norm if mmdet else "none", relu=not mmdet, key=keys[-1])
        self.first_level = first_level
        self.dialect = dialect
        self.in_channels = channels
        more = tuple(read.strides[-1] << i for i in range(1, 1 + {"none": 0, "pool": 1}.get(extra, 2)))
        self.strides = (*read.strides, *more)
        self.channels = (width,) * len(self.strides)

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        del key
        check_features("FPN", features, self.in_channels)
        maps, above = [], None
        layers = zip(features[self.first_level :], self.laterals, self.outputs, strict=True)
        for x, lateral, output in reversed(list(layers)):
            y, state = lateral(x, state, train=train)
            above = y if above is None else y + self._upsampled(above, y)
            y, state = output(above, state, train=train)
            maps.insert(0, y)
        if self.extra is not None:
            more, state = self.extra(features[-1] if self.on_input else maps[-1], state, train=train)
            return (*maps, *more), state
        return (*maps, *([max_pool(maps[-1], 1, stride=2)] if self.pool else [])), state

    def _upsampled(self, coarse: Map, fine: Finer) -> Finer:
        (h, w), doubled = fine.shape[1:3], tuple(2 * side for side in coarse.shape[1:3])
        if self.dialect == "detectron2" and (h, w) != doubled:
            raise ValueError(
                f"FPN: a map of {h}x{w} stands before one of {coarse.shape[1]}x{coarse.shape[2]}, and detectron2's "
                f"dialect doubles exactly; pad images to a multiple of {max(self.strides[: len(self.laterals)])} "
                "pixels, or choose dialect 'torchvision'"
            )
        return upsample_to(coarse, (h, w))


def upsample_to(x: Map, size: tuple[int, int]) -> Finer:
    """``resize_nearest``; to twice the size, or one less, by repetition, whose gradient is no scatter."""
    if all(old * 2 - 1 <= new <= old * 2 for old, new in zip(x.shape[1:3], size, strict=True)):
        return x.repeat(2, axis=1).repeat(2, axis=2)[:, : size[0], : size[1]]
    return resize_nearest(x, size)


def caffe2_xavier(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniform with variance 1 / fan in: detectron2's ``c2_xavier_fill``, torchvision's ``kaiming_uniform_(a=1)``."""
    return uniform(key, shape, math.sqrt(3 / math.prod(shape[:-1])))


def _check_names(dialect: str, extra: str) -> None:
    if dialect not in get_args(Dialect):
        raise ValueError(f"FPN dialect {dialect!r} is unknown; choose from {get_args(Dialect)}")
    if extra not in get_args(Extra):
        raise ValueError(f"FPN extra {extra!r} is unknown; choose from {get_args(Extra)}")
