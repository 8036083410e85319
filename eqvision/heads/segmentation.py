"""From maps to the logits of each place. Logits are float32 whatever the compute type."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers import Conv, Initializer, lecun_normal
from eqvision.types import Features

MapLogits = Float[Array, "b h w k"]


class PixelHead(eqx.Module):
    """A 1x1 convolution of one map: the last layer of a U-Net. ``level`` says which map it reads."""

    conv: Conv
    level: int = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        level: int = 0,
        init: Initializer = lecun_normal,
        key: PRNGKeyArray,
    ):
        self.conv = Conv(in_channels, num_classes, 1, padding=0, use_bias=True, init=init, key=key)
        self.level = level

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[MapLogits, eqx.nn.State]:
        del train, key
        return self.conv(features[self.level].astype(jnp.float32)), state

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "PixelHead":
        """A fresh head for another number of classes."""
        return PixelHead(self.conv.weight.shape[2], num_classes, level=self.level, key=key)
