"""Region proposal network (Ren et al. 2015): at each place of a map, which anchors hold an object and where."""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers import Conv, NormedConv, NormKind, normal
from eqvision.types import Features

SMALL = functools.partial(normal, std=0.01)


class RPNOutputs(NamedTuple):
    """Of every level, fine to coarse: ``logits`` (b n) and ``deltas`` (b n 4), float32.

    Rows run over y, then x, then the anchors of a place, as those of ``ops.anchor_grid``.
    """

    logits: tuple[Float[Array, "b _"], ...]
    deltas: tuple[Float[Array, "b _ 4"], ...]


class RPNHead(eqx.Module):
    """``depth`` 3x3 convolutions with ReLU, then one logit and four differences for each of ``num_anchors``.

    The same weights read all levels. All start as normal of deviation 0.01, as in all three references. ``depth`` is 1
    in the published R50-FPN models, 2 in torchvision's v2 and ViTDet.
    """

    convs: tuple[NormedConv, ...]
    logits: Conv
    deltas: Conv

    def __init__(
        self, channels: int, *, num_anchors: int = 3, depth: int = 1, norm: NormKind = "none", key: PRNGKeyArray
    ):
        if depth < 1:
            raise ValueError(f"RPNHead: depth {depth}; expected at least 1 convolution")
        keys = jax.random.split(key, depth + 2)
        self.convs = tuple(NormedConv(channels, channels, 3, norm=norm, init=SMALL, key=k) for k in keys[2:])
        self.logits = Conv(channels, num_anchors, 1, use_bias=True, init=SMALL, key=keys[0])
        self.deltas = Conv(channels, 4 * num_anchors, 1, use_bias=True, init=SMALL, key=keys[1])

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False
    ) -> tuple[RPNOutputs, eqx.nn.State]:
        logits, deltas = [], []
        for x in features:
            for conv in self.convs:
                x, state = conv(x, state, train=train)
                x = jax.nn.relu(x)
            logits.append(self.logits(x).reshape(x.shape[0], -1).astype(jnp.float32))
            deltas.append(self.deltas(x).reshape(x.shape[0], -1, 4).astype(jnp.float32))
        return RPNOutputs(tuple(logits), tuple(deltas)), state
