"""Mimetic initialisation (Trockman & Kolter 2023): attention begins as it ends in trained models, for small data."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from eqvision.layers.init import normal
from eqvision.layers.position import PositionEmbedding1D, sincos_1d
from eqvision.layers.transformer import TransformerStack


def mimetic_attention(stack: TransformerStack, *, gain: float = 2.0, key: PRNGKeyArray) -> TransformerStack:
    """The stack with queries that begin equal to keys: tokens attend to what is like them, and beside
    ``sine_positions`` to what is near them.

    The product of both weights is then the identity, times ``gain`` and the heads' share of the width, and noise
    (section 3 of the paper; what it does to values and projections is left out).
    """
    shape = stack.blocks.attention.query.weight.shape
    weight = normal(key, shape, math.sqrt(gain / shape[-2]))
    return eqx.tree_at(_queries_and_keys, stack, (weight, jnp.copy(weight)))


def _queries_and_keys(stack: TransformerStack):
    return stack.blocks.attention.query.weight, stack.blocks.attention.key.weight


def sine_positions(
    position: PositionEmbedding1D, *, std: float = 0.02, temperature: float = 30.0
) -> PositionEmbedding1D:
    """The table with sines and cosines of size ``std`` to be learned from; the slowest wave takes nearly 2 pi times
    ``temperature`` positions."""
    length, width = position.weight.shape
    table = sincos_1d(np.arange(length), width, temperature=temperature) * (std * math.sqrt(2.0))
    return eqx.tree_at(lambda p: p.weight, position, jnp.asarray(table, position.weight.dtype))
