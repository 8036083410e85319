"""Layer norms between a backbone whose stages end without one and a neck."""

import equinox as eqx
from jaxtyping import PRNGKeyArray

from eqvision.layers import LayerNorm
from eqvision.necks.fpn import FPN
from eqvision.types import Features


class NormedMaps(eqx.Module):
    """``neck`` behind a layer norm of each map, as detectors read Swin and ConvNeXt in mmdet and in their own code.

    The norms are over the channels of each place; published ``eps`` are 1e-5 for Swin and 1e-6 for ConvNeXt.
    """

    norms: tuple[LayerNorm, ...]
    neck: FPN
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, neck: FPN, *, eps: float = 1e-6):
        self.norms = tuple(LayerNorm(width, eps=eps) for width in neck.in_channels)
        self.neck = neck
        self.channels = neck.channels
        self.strides = neck.strides

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        normed = tuple(norm(x) for norm, x in zip(self.norms, features, strict=True))
        return self.neck(normed, state, train=train, key=key)
