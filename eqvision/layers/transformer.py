"""The transformer block and the stack of equal blocks, scanned over depth."""

import functools
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers.attention import Attention, Bias, Implementation, KeyMask
from eqvision.layers.drop import LayerScale, check_rate, drop_path, fold
from eqvision.layers.init import xavier_uniform
from eqvision.layers.linear import Initializer
from eqvision.layers.mlp import MLP, Activation, GatedMLP
from eqvision.layers.norm import LayerNorm

Remat = Literal["none", "dots", "full"]
NormOrder = Literal["pre", "post"]
MLPKind = Literal["plain", "swiglu"]


class TransformerBlock(eqx.Module):
    """Self-attention and MLP with residuals; ``pre`` normalises each branch's input (ViT), ``post`` each sum (BERT).

    ``mlp="swiglu"`` is the gated MLP of DINOv2's giant, with SiLU whatever ``activation`` is. ``use_qkv_bias``
    is for queries, keys and values; the projection behind them has a bias always.
    """

    norm1: LayerNorm
    attention: Attention
    scale1: LayerScale | None
    norm2: LayerNorm
    mlp: MLP | GatedMLP
    scale2: LayerScale | None
    norm_order: NormOrder = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        norm_order: NormOrder = "pre",
        eps: float = 1e-6,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        layer_scale: float | None = None,
        use_qkv_bias: bool = True,
        mlp: MLPKind = "plain",
        implementation: Implementation = "xla",
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray,
    ):
        if norm_order not in get_args(NormOrder):
            raise ValueError(f"norm_order {norm_order!r} is unknown; choose from {get_args(NormOrder)}")
        if mlp not in get_args(MLPKind):
            raise ValueError(f"mlp {mlp!r} is unknown; choose from {get_args(MLPKind)}")
        keys = jax.random.split(key)
        self.norm1 = LayerNorm(width, eps=eps)
        self.attention = Attention(
            width,
            num_heads,
            use_bias=use_qkv_bias,
            use_out_bias=True,
            dropout=dropout,
            implementation=implementation,
            init=init,
            key=keys[0],
        )
        self.scale1 = None if layer_scale is None else LayerScale(width, initial=layer_scale)
        self.norm2 = LayerNorm(width, eps=eps)
        build = MLP if mlp == "plain" else GatedMLP
        activation = activation if mlp == "plain" else "silu"
        self.mlp = build(width, mlp_dim, activation=activation, dropout=dropout, init=init, key=keys[1])
        self.scale2 = None if layer_scale is None else LayerScale(width, initial=layer_scale)
        self.norm_order = norm_order

    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        bias: Bias | None = None,
        key_mask: KeyMask | None = None,
        causal: bool = False,
        drop_path_rate: float | Float[Array, ""] = 0.0,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b n d"]:
        def attend(y: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
            y = self.attention(y, bias=bias, key_mask=key_mask, causal=causal, train=train, key=fold(key, 0))
            y = y if self.scale1 is None else self.scale1(y)
            return drop_path(y, drop_path_rate, train=train, key=fold(key, 1))

        def feed(y: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
            y = self.mlp(y, train=train, key=fold(key, 2))
            y = y if self.scale2 is None else self.scale2(y)
            return drop_path(y, drop_path_rate, train=train, key=fold(key, 3))

        if self.norm_order == "pre":
            x = x + attend(self.norm1(x))
            return x + feed(self.norm2(x))
        x = self.norm1(x + attend(x))
        return self.norm2(x + feed(x))


class TransformerStack(eqx.Module):
    """``depth`` equal blocks with stacked parameters, run by ``lax.scan``: compile time does not grow with depth.

    ``remat``: ``none`` keeps all activations for the backward pass, ``dots`` the matrix products, ``full``
    only each block's input. ``unroll`` blocks are compiled one after the other in each scan iteration.
    ``drop_path`` rises linearly from 0 in the first block to the given rate in the last.
    """

    blocks: TransformerBlock
    depth: int = eqx.field(static=True)
    drop_path: float = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __init__(
        self,
        depth: int,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        norm_order: NormOrder = "pre",
        eps: float = 1e-6,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        use_qkv_bias: bool = True,
        mlp: MLPKind = "plain",
        implementation: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray,
    ):
        check_rate("drop_path", drop_path)
        if remat not in get_args(Remat):
            raise ValueError(f"remat {remat!r} is unknown; choose from {get_args(Remat)}")

        def block(key: PRNGKeyArray) -> TransformerBlock:
            return TransformerBlock(
                width,
                num_heads,
                mlp_dim,
                norm_order=norm_order,
                eps=eps,
                activation=activation,
                dropout=dropout,
                layer_scale=layer_scale,
                use_qkv_bias=use_qkv_bias,
                mlp=mlp,
                implementation=implementation,
                init=init,
                key=key,
            )

        self.blocks = eqx.filter_vmap(block)(jax.random.split(key, depth))
        self.depth = depth
        self.drop_path = drop_path
        self.remat = remat
        self.unroll = unroll

    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        bias: Bias | None = None,
        key_mask: KeyMask | None = None,
        causal: bool = False,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b n d"]:
        run = functools.partial(self._block, bias=bias, key_mask=key_mask, causal=causal, train=train, key=key)
        body = rematerialised(run, self.remat if train else "none")
        return lax.scan(lambda y, layer: (body(y, *layer), None), x, self._layers(), unroll=self.unroll)[0]

    def intermediates(
        self, x: Float[Array, "b n d"], *, bias: Bias | None = None, key_mask: KeyMask | None = None
    ) -> Float[Array, "l b n d"]:
        """The output of every block, in inference."""
        run = functools.partial(self._block, bias=bias, key_mask=key_mask, causal=False, train=False, key=None)
        return lax.scan(lambda y, layer: (run(y, *layer),) * 2, x, self._layers())[1]

    def _layers(self):
        rates = np.linspace(0, self.drop_path, self.depth, dtype=np.float32)
        return self.blocks, jnp.arange(self.depth), jnp.asarray(rates)

    def _block(self, x, block, index, rate, *, bias, key_mask, causal, train, key):
        return block(
            x,
            bias=bias,
            key_mask=key_mask,
            causal=causal,
            drop_path_rate=rate if self.drop_path else 0.0,
            train=train,
            key=fold(key, index),
        )


def rematerialised(function, remat: Remat):
    """``jax.checkpoint`` by policy name; ``prevent_cse`` is not needed inside a scan and would cost time."""
    if remat == "none":
        return function
    policies = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
    return jax.checkpoint(function, prevent_cse=False, policy=policies[remat])
