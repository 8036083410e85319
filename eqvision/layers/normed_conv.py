"""A convolution and what normalises it, by name: the part in which necks and heads of detectors differ."""

from typing import Literal, get_args

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers.batch_norm import BatchNorm, FrozenBatchNorm
from eqvision.layers.conv import Conv
from eqvision.layers.init import he_normal_fan_out
from eqvision.layers.linear import Initializer
from eqvision.layers.norm import GroupNorm, LayerNorm

NormKind = Literal["none", "batch", "frozen", "group", "layer"]


class NormedConv(eqx.Module):
    """Convolution with symmetric padding of half its window, then a norm; without a norm it has a bias.

    ``group`` has 32 groups and eps 1e-5; ``layer`` is over the channels of each place with eps 1e-6 (ViTDet's "LN").
    Raises ValueError for another name.
    """

    conv: Conv
    norm: BatchNorm | FrozenBatchNorm | GroupNorm | LayerNorm | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        norm: NormKind = "none",
        init: Initializer = he_normal_fan_out,
        key: PRNGKeyArray,
    ):
        self.norm = build_norm(norm, out_channels)
        self.conv = Conv(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            use_bias=self.norm is None,
            init=init,
            key=key,
        )

    def __call__(
        self, x: Float[Array, "b h w i"], state: eqx.nn.State, *, train: bool = False
    ) -> tuple[Float[Array, "b h2 w2 o"], eqx.nn.State]:
        x = self.conv(x)
        if self.norm is None:
            return x, state
        if isinstance(self.norm, (BatchNorm, FrozenBatchNorm)):
            return self.norm(x, state, train=train)
        return self.norm(x), state


def build_norm(kind: NormKind, channels: int) -> BatchNorm | FrozenBatchNorm | GroupNorm | LayerNorm | None:
    """The norm of a name of ``NormKind``, None for ``none``. Raises ValueError for another name."""
    if kind not in get_args(NormKind):
        raise ValueError(f"norm {kind!r} is unknown; choose from {get_args(NormKind)}")
    builders = {"batch": BatchNorm, "frozen": FrozenBatchNorm, "group": GroupNorm, "layer": LayerNorm}
    return None if kind == "none" else builders[kind](channels)
