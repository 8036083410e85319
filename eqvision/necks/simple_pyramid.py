"""ViTDet's simple feature pyramid (Li et al. 2022, "Exploring Plain Vision Transformer Backbones", section 3)."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers import LayerNorm, activate, max_pool
from eqvision.layers.conv_transpose import ConvTranspose
from eqvision.layers.normed_conv import NormedConv, NormKind
from eqvision.necks.checks import check_features, check_levels
from eqvision.necks.fpn import ExtraLevels, caffe2_xavier
from eqvision.types import Features


class PyramidLevel(eqx.Module):
    """One map from the backbone's: doubled by transposed convolutions, kept, or halved; then 1x1 and 3x3 convolutions.

    Each doubling halves the channels; between two stand a layer norm (eps 1e-6) and a GELU.
    """

    up: tuple[ConvTranspose, ...]
    up_norm: LayerNorm | None
    reduce: NormedConv
    output: NormedConv
    halve: bool = eqx.field(static=True)

    def __init__(self, in_channels: int, width: int, *, doublings: int, halve: bool, norm: NormKind, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        widths = [in_channels >> i for i in range(doublings + 1)]
        self.up = tuple(ConvTranspose(widths[i], widths[i + 1], 2, stride=2, key=keys[i]) for i in range(doublings))
        self.up_norm = LayerNorm(widths[1]) if doublings == 2 else None
        self.reduce = NormedConv(widths[-1], width, 1, norm=norm, init=caffe2_xavier, key=keys[2])
        self.output = NormedConv(width, width, 3, norm=norm, init=caffe2_xavier, key=keys[3])
        self.halve = halve

    def __call__(
        self, x: Float[Array, "b h w i"], state: eqx.nn.State, *, train: bool = False
    ) -> tuple[Float[Array, "b h2 w2 o"], eqx.nn.State]:
        for i, up in enumerate(self.up):
            x = up(x if not i or self.up_norm is None else activate(self.up_norm(x), "gelu"))
        x = max_pool(x, 2, stride=2) if self.halve else x
        x, state = self.reduce(x, state, train=train)
        return self.output(x, state, train=train)


class SimplePyramid(eqx.Module):
    """Maps of ``out_strides``, each from the one map of a plain backbone; no level reads another.

    Built from ``channels`` and ``strides`` of the backbone; of several maps the last is read. A stride must be that of
    the backbone divided by 4, 2 or 1, or its double. ``norm`` is that of the convolutions, ``layer`` as published.
    ``pool`` adds a level that takes every second place of the last (P6). ``p6p7`` adds two others instead, by strided
    convolutions of the last and a ReLU between them, as Scenic's CenterNet2. Raises ValueError for another stride.
    """

    levels: tuple[PyramidLevel, ...]
    extra: ExtraLevels | None
    pool: bool = eqx.field(static=True)
    in_channels: tuple[int, ...] = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        width: int = 256,
        *,
        out_strides: tuple[int, ...] = (4, 8, 16, 32),
        norm: NormKind = "layer",
        pool: bool = True,
        p6p7: bool = False,
        key: PRNGKeyArray,
    ):
        check_levels("SimplePyramid", channels, strides, len(channels) - 1)
        check_levels("SimplePyramid", (width,) * len(out_strides), out_strides)
        keys = jax.random.split(key, len(out_strides))
        more = jax.random.fold_in(key, len(out_strides))
        self.levels = tuple(
            _level(channels[-1], strides[-1], out, width, norm, key=k) for out, k in zip(out_strides, keys, strict=True)
        )
        self.extra = ExtraLevels(width, width, norm="none", relu=True, key=more) if p6p7 else None
        self.pool = pool and not p6p7
        self.in_channels = channels
        self.strides = (*out_strides, *(out_strides[-1] << i for i in range(1, 1 + (2 if p6p7 else int(pool)))))
        self.channels = (width,) * len(self.strides)

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        del key
        check_features("SimplePyramid", features, self.in_channels)
        maps = []
        for level in self.levels:
            y, state = level(features[-1], state, train=train)
            maps.append(y)
        if self.extra is not None:
            more, state = self.extra(maps[-1], state, train=train)
            return (*maps, *more), state
        return (*maps, *([max_pool(maps[-1], 1, stride=2)] if self.pool else [])), state


def _level(
    in_channels: int, stride: int, out_stride: int, width: int, norm: NormKind, *, key: PRNGKeyArray
) -> PyramidLevel:
    doublings = {stride // 4: 2, stride // 2: 1, stride: 0, 2 * stride: 0}
    if out_stride not in doublings:
        raise ValueError(
            f"SimplePyramid: a map of stride {out_stride} cannot be made from one of stride {stride}; "
            f"possible are {', '.join(map(str, sorted(doublings)))}"
        )
    halve = out_stride == 2 * stride
    return PyramidLevel(in_channels, width, doublings=doublings[out_stride], halve=halve, norm=norm, key=key)
