"""Mimetic initialisation (Trockman & Kolter 2023): attention begins as it ends in trained models, for small data."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from eqvision.layers.attention import Attention
from eqvision.layers.init import normal
from eqvision.layers.position import PositionEmbedding1D, sincos_1d
from eqvision.layers.relative_buckets import RelativeBias


def mimetic_attention(attention: Attention, *, gain: float = 2.0, key: PRNGKeyArray) -> Attention:
    """Attention, or a stack of such, whose queries begin equal to keys: tokens attend to what is like them, and beside
    ``sine_positions`` to what is near them.

    The product of both weights is then the identity, times ``gain`` and the heads' share of the width, and noise
    (section 3 of the paper; what it does to values and projections is left out). Raises ValueError for keys that read
    vectors of another width than queries do.
    """
    shape, keys = attention.query.weight.shape, attention.key.weight.shape
    if shape != keys:
        raise ValueError(f"mimetic_attention: queries are made by {shape} and keys by {keys}; they cannot begin equal")
    scale = 1.0 if attention.scaled else (shape[-1] // attention.num_heads) ** -0.25
    weight = normal(key, shape, math.sqrt(gain / shape[-2]) * scale)
    return eqx.tree_at(lambda a: (a.query.weight, a.key.weight), attention, (weight, jnp.copy(weight)))


def near_bias(bias: RelativeBias, *, slope: float = 0.5) -> RelativeBias:
    """The biases that fall by ``slope`` with each bucket of distance, to be learned from."""
    buckets = np.arange(len(bias.weight))
    away = buckets % (len(buckets) // 2) if bias.bidirectional else buckets
    weight = jnp.broadcast_to(-slope * jnp.asarray(away, bias.weight.dtype)[:, None], bias.weight.shape)
    return eqx.tree_at(lambda b: b.weight, bias, weight)


def sine_positions(
    position: PositionEmbedding1D, *, std: float = 0.02, temperature: float = 30.0
) -> PositionEmbedding1D:
    """The table with sines and cosines of size ``std`` to be learned from; the slowest wave takes nearly 2 pi times
    ``temperature`` positions."""
    length, width = position.weight.shape
    table = sincos_1d(np.arange(length), width, temperature=temperature) * (std * math.sqrt(2.0))
    return eqx.tree_at(lambda p: p.weight, position, jnp.asarray(table, position.weight.dtype))
