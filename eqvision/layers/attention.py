"""Attention: one function with several implementations that give equal numbers, and the layer around it."""

import math
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from eqvision.layers.drop import dropout
from eqvision.layers.init import xavier_uniform
from eqvision.layers.linear import Initializer, Linear

Implementation = Literal["xla", "cudnn", "blocked"]

Queries = Float[Array, "b q h d"]
Keys = Float[Array, "b k h d"]
Values = Float[Array, "b k h e"]
Bias = Float[Array, "#b #h #q #k"]
KeyMask = Bool[Array, "b k"]


def attention(
    query: Queries,
    key: Keys,
    value: Values,
    *,
    bias: Bias | None = None,
    key_mask: KeyMask | None = None,
    causal: bool = False,
    implementation: Implementation = "xla",
    block_size: int = 256,
) -> Float[Array, "b q h e"]:
    """Scaled dot-product attention (Vaswani et al. 2017), scale 1/sqrt(d), softmax in float32.

    ``key_mask`` is True on real keys; a query that sees no key gives zeros. With ``causal`` the last query
    is aligned with the last key. ``blocked`` runs over ``block_size`` queries at a time and holds no
    logits for the backward pass, so memory grows with the number of keys times the block. ``cudnn`` is the fused
    kernel: NVIDIA GPU, float16 or bfloat16 only.
    """
    if key_mask is not None:  # padding may hold anything, NaN too, and 0 * NaN is NaN in both products
        key, value = (jnp.where(key_mask[:, :, None, None], x, 0) for x in (key, value))
    if implementation == "xla":
        mask = _mask(key_mask, causal, query.shape[1], key.shape[1])
        return _attend(query, key, value, bias, mask)
    if implementation == "blocked":
        return _blocked(query, key, value, bias, key_mask, causal, block_size)
    if implementation == "cudnn":
        return _cudnn(query, key, value, bias, key_mask, causal)
    raise ValueError(f"attention implementation {implementation!r} is unknown; choose from {get_args(Implementation)}")


def _mask(key_mask: KeyMask | None, causal: bool, queries: int, keys: int, first: int | Array = 0):
    """What each query may see, broadcast to (b, h, q, k); ``first`` is the position of the first query."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if causal:
        position = first + jnp.arange(queries)[:, None] + (keys - queries if isinstance(first, int) else 0)
        lower = (jnp.arange(keys)[None, :] <= position)[None, None]
        mask = lower if mask is None else mask & lower
    return mask


def _attend(query, key, value, bias, mask):
    """Normalise after the product with the values: XLA fuses the division badly into the matrix product.

    On XLA:CPU this makes the attention block more than twice as fast as ``softmax(s) @ v``.
    """
    scaled = query * (1.0 / math.sqrt(query.shape[-1]))
    logits = jnp.einsum("bqhd,bkhd->bhqk", scaled, key, preferred_element_type=_wide(query))
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    total = jnp.sum(weights, axis=-1)  # b h q
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value, preferred_element_type=total.dtype)
    if mask is not None:
        total = jnp.where(total == 0, 1.0, total)
    return (mixed / total.swapaxes(1, 2)[..., None]).astype(query.dtype)


def _wide(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _blocked(query, key, value, bias, key_mask, causal, block_size):
    """A loop over blocks of queries; the last block is padded and its extra rows dropped."""
    b, queries, heads, width = query.shape
    block_size = min(block_size, queries)
    blocks = -(-queries // block_size)
    padding = blocks * block_size - queries
    padded = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    split = jnp.moveaxis(padded.reshape(b, blocks, block_size, heads, width), 1, 0)
    bias_per_query = bias is not None and bias.shape[2] != 1
    bias_blocks = _split_bias(bias, blocks, block_size, padding) if bias_per_query else None
    offset = key.shape[1] - queries

    @jax.checkpoint
    def one_block(query_block, bias_block, index):
        mask = _mask(key_mask, causal, block_size, key.shape[1], first=offset + index * block_size)
        return _attend(query_block, key, value, bias_block if bias_per_query else bias, mask)

    # A scan and not a map: the gradients of keys and values are then one running sum.
    mixed = lax.map(lambda block: one_block(*block), (split, bias_blocks, jnp.arange(blocks)))
    return jnp.moveaxis(mixed, 0, 1).reshape(b, blocks * block_size, heads, -1)[:, :queries]


def _split_bias(bias, blocks, block_size, padding):
    padded = jnp.pad(bias, ((0, 0), (0, 0), (0, padding), (0, 0)))
    b, h, _, k = padded.shape
    return jnp.moveaxis(padded.reshape(b, h, blocks, block_size, k), 2, 0)


def _cudnn(query, key, value, bias, key_mask, causal):
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        raise ValueError(
            f"attention: cudnn needs float16 or bfloat16, got {query.dtype}; set compute_dtype or use 'xla'"
        )
    mask = _mask(key_mask, causal, query.shape[1], key.shape[1])
    return jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask, implementation="cudnn")


class Attention(eqx.Module):
    """Multi-head attention with separate projections of query, key and value.

    ``dropout`` is applied to the output projection (the weights themselves are never dropped: fused
    kernels do not offer it, and ViT, DeiT and BERT-sized fine-tuning do not need it). ``use_out_bias`` None: as
    ``use_bias``.
    """

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    num_heads: int = eqx.field(static=True)
    dropout: float = eqx.field(static=True)
    implementation: Implementation = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        kv_width: int | None = None,
        use_bias: bool = True,
        use_out_bias: bool | None = None,
        dropout: float = 0.0,
        implementation: Implementation = "xla",
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray,
    ):
        if width % num_heads:
            raise ValueError(f"Attention: width {width} cannot be split into {num_heads} heads of equal size")
        keys = jax.random.split(key, 4)
        kv_width = width if kv_width is None else kv_width
        self.query = Linear(width, width, use_bias=use_bias, init=init, key=keys[0])
        self.key = Linear(kv_width, width, use_bias=use_bias, init=init, key=keys[1])
        self.value = Linear(kv_width, width, use_bias=use_bias, init=init, key=keys[2])
        out_bias = use_bias if use_out_bias is None else use_out_bias
        self.out = Linear(width, width, use_bias=out_bias, init=init, key=keys[3])
        self.num_heads = num_heads
        self.dropout = dropout
        self.implementation = implementation

    def __call__(
        self,
        query: Float[Array, "b q d"],
        key_input: Float[Array, "b k e"] | None = None,
        value_input: Float[Array, "b k e"] | None = None,
        *,
        bias: Bias | None = None,
        key_mask: KeyMask | None = None,
        causal: bool = False,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b q d"]:
        """Self-attention; with ``key_input`` cross-attention; values come from the keys unless given."""
        key_input = query if key_input is None else key_input
        value_input = key_input if value_input is None else value_input
        # Flattened once: each Linear would else keep an equal copy of its input for the backward pass of a scan.
        flat, batch = query.reshape(-1, query.shape[-1]), query.shape[0]
        flat_key = flat if key_input is query else key_input.reshape(-1, key_input.shape[-1])
        flat_value = flat_key if value_input is key_input else value_input.reshape(-1, value_input.shape[-1])
        mixed = attention(
            self._heads(self.query(flat), batch),
            self._heads(self.key(flat_key), batch),
            self._heads(self.value(flat_value), batch),
            bias=bias,
            key_mask=key_mask,
            causal=causal,
            implementation=self.implementation,
        )
        return dropout(self.out(mixed.reshape(query.shape)), self.dropout, train=train, key=key)

    def _heads(self, x: Float[Array, "bn d"], batch) -> Float[Array, "b n h e"]:  # no int in jax.export: a symbol
        return x.reshape(batch, -1, self.num_heads, x.shape[-1] // self.num_heads)
