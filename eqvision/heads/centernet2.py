"""CenterNet2's first stage (Zhou et al. 2021, "Probabilistic two-stage detection"): where objects are, of any class."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.heads.rpn import SMALL
from eqvision.layers import Conv, GroupNorm
from eqvision.types import Features

PRIOR = -4.6  # a probability of 0.01 in every cell before training
FIRST_DISTANCE = 8.0  # in cells: near the middle of each level's range of sizes


class CenterOutputs(NamedTuple):
    """Of every level, fine to coarse: ``logits`` of a centre in the cell, ``distances`` from its middle to the left,
    upper, right and lower side of the object, in cells and not negative. Float32; rows run over y, then x.
    """

    logits: tuple[Float[Array, "b _"], ...]
    distances: tuple[Float[Array, "b _ 4"], ...]


class CenterProposalHead(eqx.Module):
    """``depth`` 3x3 convolutions with group norm and ReLU, then a 3x3 convolution each for heatmap and distances.

    The same weights read all levels, but each level has a factor of its own for the distances (``scales``).
    Convolutions have biases before their norms too, as in the published code.
    """

    convs: tuple[Conv, ...]
    norms: tuple[GroupNorm, ...]
    logits: Conv
    distances: Conv
    scales: Float[Array, " levels"]

    def __init__(self, channels: int, *, levels: int = 5, depth: int = 4, num_groups: int = 32, key: PRNGKeyArray):
        keys = jax.random.split(key, depth + 2)
        options = {"padding": 1, "use_bias": True, "init": SMALL}
        self.convs = tuple(Conv(channels, channels, 3, **options, key=k) for k in keys[2:])
        self.norms = tuple(GroupNorm(channels, num_groups=num_groups) for _ in keys[2:])
        self.logits = _with_bias(Conv(channels, 1, 3, **options, key=keys[0]), PRIOR)
        self.distances = _with_bias(Conv(channels, 4, 3, **options, key=keys[1]), FIRST_DISTANCE)
        self.scales = jnp.ones((levels,))

    def __call__(self, features: Features) -> CenterOutputs:
        logits, distances = [], []
        for level, x in enumerate(features):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = jax.nn.relu(norm(conv(x)))
            logits.append(self.logits(x).reshape(x.shape[0], -1).astype(jnp.float32))
            raw = self.distances(x).reshape(x.shape[0], -1, 4).astype(jnp.float32)
            distances.append(jax.nn.relu(raw * self.scales[level]))
        return CenterOutputs(tuple(logits), tuple(distances))


def _with_bias(conv: Conv, value: float) -> Conv:
    assert conv.bias is not None
    return eqx.tree_at(lambda each: each.bias, conv, jnp.full_like(conv.bias, value))
