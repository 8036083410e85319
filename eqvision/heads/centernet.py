"""CenterNet's head: maps of centres, sizes and offsets from a map of features (Zhou et al. 2019)."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers import Conv
from eqvision.layers.torch_init import torch_conv
from eqvision.types import CenterPredictions, Features

PRIOR_BIAS = -2.19  # a probability of 0.1 at every cell before training


class MapBranch(eqx.Module):
    """A 3x3 convolution, ReLU and a 1x1 convolution with as many outputs as the branch predicts numbers."""

    conv: Conv
    out: Conv

    def __init__(self, in_channels: int, width: int, outputs: int, *, bias: float = 0.0, key: PRNGKeyArray):
        """``bias`` is that of the last convolution at the start; that of the first is 0."""
        keys = jax.random.split(key)
        self.conv = _with_bias(torch_conv(in_channels, width, 3, key=keys[0]), 0.0)
        self.out = _with_bias(torch_conv(width, outputs, 1, key=keys[1]), bias)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        return self.out(jax.nn.relu(self.conv(x)))


def _with_bias(conv: Conv, value: float) -> Conv:
    assert conv.bias is not None
    return eqx.tree_at(lambda each: each.bias, conv, jnp.full_like(conv.bias, value))


class CenterHead(eqx.Module):
    """One branch each for the heatmap of every class, for width and height, and for the offset of the centre.

    ``stacks`` is the number of maps that are read, each by branches of its own: their parameters have an axis of that
    length in front. It is 2 for Hourglass-104 and else 1. ``width`` is 64 with ResNets and 256 with DLA and Hourglass
    in the published models.
    """

    heatmap: MapBranch
    size: MapBranch
    offset: MapBranch

    def __init__(self, in_channels: int, num_classes: int, *, stacks: int = 1, width: int = 64, key: PRNGKeyArray):
        def branch(outputs: int, bias: float, number: int) -> MapBranch:
            keys = jax.random.split(jax.random.fold_in(key, number), stacks)
            return jax.vmap(lambda key: MapBranch(in_channels, width, outputs, bias=bias, key=key))(keys)

        self.heatmap, self.size, self.offset = branch(num_classes, PRIOR_BIAS, 0), branch(2, 0.0, 1), branch(2, 0.0, 2)

    @property
    def stacks(self) -> int:
        """How many maps are read."""
        return self.heatmap.conv.weight.shape[0]

    @property
    def in_channels(self) -> int:
        """Channels of each of them."""
        return self.heatmap.conv.weight.shape[3]

    def __call__(self, features: Features) -> CenterPredictions:
        """From the last ``stacks`` maps."""

        def outputs(branch: MapBranch) -> Float[Array, "l b h w o"]:
            each = (jax.tree.map(lambda leaf, i=i: leaf[i], branch) for i in range(self.stacks))
            maps = jnp.stack([part(x) for part, x in zip(each, features[-self.stacks :], strict=True)])
            return maps.astype(jnp.float32)  # places and losses are not for half precision

        return CenterPredictions(outputs(self.heatmap), outputs(self.size), outputs(self.offset))

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "CenterHead":
        """The same sizes and offsets, with a fresh last layer of the heatmaps."""
        width, keys = self.heatmap.out.weight.shape[3], jax.random.split(key, self.stacks)
        fresh = jax.vmap(lambda key: _with_bias(torch_conv(width, num_classes, 1, key=key), PRIOR_BIAS))(keys)
        return eqx.tree_at(lambda head: head.heatmap.out, self, fresh)
