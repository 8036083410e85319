"""DETR's encoder and decoder (Carion et al. 2020, section A.3): positions go into every attention, by keys and queries.

Values never hold positions. Post-norm as published, or pre-norm with a norm behind the encoder. Stacks of equal layers
have stacked parameters and are scanned. Parameters start as in facebookresearch/detr: all matrices Xavier-uniform, of
which query, key and value of an attention are one.

Unlike there, attention weights are not dropped in training: see ``Attention``. ``dropout`` acts behind attention,
inside the MLP and behind it.
"""

import functools
import math
from collections.abc import Callable
from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers.attention import Attention, Implementation, KeyMask
from eqvision.layers.drop import fold
from eqvision.layers.init import uniform
from eqvision.layers.mlp import MLP, Activation
from eqvision.layers.norm import LayerNorm
from eqvision.layers.transformer import NormOrder, Remat, rematerialised
from eqvision.ops.collectives import vary_like

EPS = 1e-5  # of all layer norms

Tokens = Float[Array, "b n d"]


class DETREncoderLayer(eqx.Module):
    """Self-attention and MLP over the tokens of a feature map."""

    attention: Attention
    norm1: LayerNorm
    mlp: MLP
    norm2: LayerNorm
    norm_order: NormOrder = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        norm_order: NormOrder = "post",
        activation: Activation = "relu",
        dropout: float = 0.1,
        eps: float = EPS,
        implementation: Implementation = "xla",
        key: PRNGKeyArray,
    ):
        check_order(norm_order)
        keys = jax.random.split(key)
        self.attention = detr_attention(width, num_heads, dropout, implementation, key=keys[0])
        self.norm1 = LayerNorm(width, eps=eps)
        self.mlp = detr_mlp(width, mlp_dim, activation, dropout, key=keys[1])
        self.norm2 = LayerNorm(width, eps=eps)
        self.norm_order = norm_order

    def __call__(
        self,
        x: Tokens,
        position: Tokens,
        *,
        key_mask: KeyMask | None = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Tokens:
        def attend(y: Tokens) -> Tokens:
            placed = y + position
            return self.attention(placed, placed, y, key_mask=key_mask, train=train, key=fold(key, 0))

        x = residual(x, self.norm1, attend, self.norm_order)
        return residual(x, self.norm2, lambda y: self.mlp(y, train=train, key=fold(key, 1)), self.norm_order)


class DETRDecoderLayer(eqx.Module):
    """Self-attention among the queries, attention from the queries to the map, MLP."""

    self_attention: Attention
    norm1: LayerNorm
    cross_attention: Attention
    norm2: LayerNorm
    mlp: MLP
    norm3: LayerNorm
    norm_order: NormOrder = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        norm_order: NormOrder = "post",
        activation: Activation = "relu",
        dropout: float = 0.1,
        eps: float = EPS,
        implementation: Implementation = "xla",
        key: PRNGKeyArray,
    ):
        check_order(norm_order)
        keys = jax.random.split(key, 3)
        self.self_attention = detr_attention(width, num_heads, dropout, implementation, key=keys[0])
        self.norm1 = LayerNorm(width, eps=eps)
        self.cross_attention = detr_attention(width, num_heads, dropout, implementation, key=keys[1])
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = detr_mlp(width, mlp_dim, activation, dropout, key=keys[2])
        self.norm3 = LayerNorm(width, eps=eps)
        self.norm_order = norm_order

    def __call__(
        self,
        x: Float[Array, "b q d"],
        query_position: Float[Array, "b q d"],
        memory: Tokens,
        placed_memory: Tokens,
        *,
        key_mask: KeyMask | None = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b q d"]:
        """``placed_memory`` is the memory with its positions, the same for all layers."""

        def among(y: Float[Array, "b q d"]) -> Float[Array, "b q d"]:
            placed = y + query_position
            return self.self_attention(placed, placed, y, train=train, key=fold(key, 0))

        def look(y: Float[Array, "b q d"]) -> Float[Array, "b q d"]:
            placed, options = y + query_position, {"train": train, "key": fold(key, 1)}
            return self.cross_attention(placed, placed_memory, memory, key_mask=key_mask, **options)

        x = residual(x, self.norm1, among, self.norm_order)
        x = residual(x, self.norm2, look, self.norm_order)
        return residual(x, self.norm3, lambda y: self.mlp(y, train=train, key=fold(key, 2)), self.norm_order)


class DETREncoder(eqx.Module):
    """``depth`` encoder layers; with ``norm_order="pre"`` a final norm stands behind them."""

    layers: DETREncoderLayer
    norm: LayerNorm | None
    depth: int = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __init__(
        self,
        depth: int,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        norm_order: NormOrder = "post",
        activation: Activation = "relu",
        dropout: float = 0.1,
        eps: float = EPS,
        implementation: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        check_stack("DETREncoder", depth, remat)
        options = {"norm_order": norm_order, "activation": activation, "dropout": dropout, "eps": eps}
        layer = functools.partial(DETREncoderLayer, width, num_heads, mlp_dim, implementation=implementation, **options)
        self.layers = eqx.filter_vmap(lambda key: layer(key=key))(jax.random.split(key, depth))
        self.norm = LayerNorm(width, eps=eps) if norm_order == "pre" else None
        self.depth = depth
        self.remat = remat
        self.unroll = unroll

    def __call__(
        self,
        x: Tokens,
        position: Tokens,
        *,
        key_mask: KeyMask | None = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Tokens:
        """``key_mask`` is True on tokens of the image; what padding tokens come out as is arbitrary."""

        def run(y: Tokens, layer: DETREncoderLayer, index: Array) -> Tokens:
            return layer(y, position, key_mask=key_mask, train=train, key=fold(key, index))

        body = rematerialised(run, self.remat if train else "none")
        layers = (self.layers, jnp.arange(self.depth))
        x = lax.scan(lambda y, each: (body(y, *each), None), x, layers, unroll=self.unroll)[0]
        return x if self.norm is None else self.norm(x)


class DETRDecoder(eqx.Module):
    """``depth`` decoder layers; the output of each goes through one and the same norm, and not on to the next layer."""

    layers: DETRDecoderLayer
    norm: LayerNorm
    depth: int = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __init__(
        self,
        depth: int,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        norm_order: NormOrder = "post",
        activation: Activation = "relu",
        dropout: float = 0.1,
        eps: float = EPS,
        implementation: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        check_stack("DETRDecoder", depth, remat)
        options = {"norm_order": norm_order, "activation": activation, "dropout": dropout, "eps": eps}
        layer = functools.partial(DETRDecoderLayer, width, num_heads, mlp_dim, implementation=implementation, **options)
        self.layers = eqx.filter_vmap(lambda key: layer(key=key))(jax.random.split(key, depth))
        self.norm = LayerNorm(width, eps=eps)
        self.depth = depth
        self.remat = remat
        self.unroll = unroll

    def __call__(
        self,
        query_position: Float[Array, "b q d"],
        memory: Tokens,
        position: Tokens,
        *,
        key_mask: KeyMask | None = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "l b q d"]:
        """What every layer says of the queries, which start as zeros. ``key_mask`` is True on tokens of the image."""
        placed = memory + position

        def run(y: Float[Array, "b q d"], layer: DETRDecoderLayer, index: Array) -> Float[Array, "b q d"]:
            options = {"key_mask": key_mask, "train": train, "key": fold(key, index)}
            return layer(y, query_position, memory, placed, **options)

        body = rematerialised(run, self.remat if train else "none")
        start, layers = vary_like(jnp.zeros_like(query_position), memory), (self.layers, jnp.arange(self.depth))

        def step(y: Array, each: tuple[DETRDecoderLayer, Array]) -> tuple[Array, Array]:
            y = body(y, *each)
            return y, y

        return self.norm(lax.scan(step, start, layers, unroll=self.unroll)[1])


def residual(x: Tokens, norm: LayerNorm, branch: Callable[[Tokens], Tokens], norm_order: NormOrder) -> Tokens:
    """``pre`` normalises the branch's input, ``post`` the sum."""
    return x + branch(norm(x)) if norm_order == "pre" else norm(x + branch(x))


def detr_attention(
    width: int, num_heads: int, dropout: float, implementation: Implementation, *, key: PRNGKeyArray
) -> Attention:
    """Query, key and value start as one Xavier-uniform matrix (d, 3 d), which is how torch stores and draws them."""
    built = Attention(width, num_heads, dropout=dropout, implementation=implementation, key=key)
    return eqx.tree_at(
        lambda each: (each.query.weight, each.key.weight, each.value.weight),
        built,
        replace_fn=lambda weight: weight * math.sqrt(0.5),
    )


def detr_mlp(width: int, mlp_dim: int, activation: Activation, dropout: float, *, key: PRNGKeyArray) -> MLP:
    """Xavier-uniform matrices, and biases as ``torch.nn.Linear`` draws them."""
    keys = jax.random.split(key, 3)
    built = MLP(width, mlp_dim, activation=activation, dropout=dropout, key=keys[0])
    biases = (uniform(keys[1], (mlp_dim,), width**-0.5), uniform(keys[2], (width,), mlp_dim**-0.5))
    return eqx.tree_at(lambda each: (each.fc1.bias, each.fc2.bias), built, biases)


def check_order(norm_order: str) -> None:
    """Raise a ValueError for a norm order that does not exist."""
    if norm_order not in get_args(NormOrder):
        raise ValueError(f"norm_order {norm_order!r} is unknown; choose from {get_args(NormOrder)}")


def check_stack(what: str, depth: int, remat: str) -> None:
    """Raise a ValueError for a stack of no layers or an unknown policy."""
    if depth < 1:
        raise ValueError(f"{what} needs at least one layer, got depth {depth}")
    if remat not in get_args(Remat):
        raise ValueError(f"remat {remat!r} is unknown; choose from {get_args(Remat)}")
