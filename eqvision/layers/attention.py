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
Visible = Bool[Array, "#b #q #k"]  # which keys each query may see


def attention(
    query: Queries,
    key: Keys,
    value: Values,
    *,
    bias: Bias | None = None,
    key_mask: KeyMask | None = None,
    visible: Visible | None = None,
    causal: bool = False,
    scaled: bool = True,
    implementation: Implementation = "xla",
    block_size: int = 256,
) -> Float[Array, "b q h e"]:
    """Scaled dot-product attention (Vaswani et al. 2017), scale 1/sqrt(d) unless not ``scaled``, softmax in float32.

    ``key_mask`` is True on real keys, ``visible`` on those that a query may see besides; a query that sees no key gives
    zeros. With ``causal`` the last query is aligned with the last key. ``blocked`` runs over ``block_size`` queries at
    a time and holds no logits for the backward pass, so memory grows with the number of keys times the block. ``cudnn``
    is the fused kernel: NVIDIA GPU, float16 or bfloat16 only.
    """
    if key_mask is not None:  # padding may hold anything, NaN too, and 0 * NaN is NaN in both products
        key, value = (jnp.where(key_mask[:, :, None, None], x, 0) for x in (key, value))
    if implementation == "xla":
        mask = _seen(_mask(key_mask, causal, query.shape[1], key.shape[1]), visible)
        return _attend(query, key, value, bias, mask, scaled)
    if implementation == "blocked":
        return _blocked(query, key, value, bias, key_mask, visible, causal, scaled, block_size)
    if implementation == "cudnn":
        return _cudnn(query, key, value, bias, key_mask, visible, causal, scaled)
    raise ValueError(f"attention implementation {implementation!r} is unknown; choose from {get_args(Implementation)}")


def _mask(key_mask: KeyMask | None, causal: bool, queries: int, keys: int, first: int | Array = 0):
    """What each query may see, broadcast to (b, h, q, k); ``first`` is the position of the first query."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if causal:
        position = first + jnp.arange(queries)[:, None] + (keys - queries if isinstance(first, int) else 0)
        lower = (jnp.arange(keys)[None, :] <= position)[None, None]
        mask = lower if mask is None else mask & lower
    return mask


def _seen(mask, visible: Visible | None):
    """What ``_mask`` gives, and besides it what the caller says of each query."""
    if visible is None:
        return mask
    return visible[:, None] if mask is None else mask & visible[:, None]


def _attend(query, key, value, bias, mask, scaled):
    """Normalise after the product with the values: XLA fuses the division badly into the matrix product.

    On XLA:CPU this makes the attention block more than twice as fast as ``softmax(s) @ v``.
    """
    weighed = query * (1.0 / math.sqrt(query.shape[-1])) if scaled else query
    logits = jnp.einsum("bqhd,bkhd->bhqk", weighed, key, preferred_element_type=_wide(query))
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


def _blocked(query, key, value, bias, key_mask, visible, causal, scaled, block_size):
    """A loop over blocks of queries; the last block is padded and its extra rows dropped."""
    b, queries, heads, width = query.shape
    block_size = min(block_size, queries)
    blocks = -(-queries // block_size)
    padding = blocks * block_size - queries
    padded = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    split = jnp.moveaxis(padded.reshape(b, blocks, block_size, heads, width), 1, 0)
    bias_per_query = bias is not None and bias.shape[2] != 1
    bias_blocks = _split_bias(bias, blocks, block_size, padding) if bias_per_query else None
    visible_per_query = visible is not None and visible.shape[1] != 1
    visible_blocks = None
    if visible is not None and visible_per_query:
        visible_blocks = _split_bias(visible[:, None], blocks, block_size, padding)[:, :, 0]
    offset = key.shape[1] - queries

    @jax.checkpoint
    def one_block(query_block, bias_block, visible_block, index):
        mask = _mask(key_mask, causal, block_size, key.shape[1], first=offset + index * block_size)
        mask = _seen(mask, visible_block if visible_per_query else visible)
        return _attend(query_block, key, value, bias_block if bias_per_query else bias, mask, scaled)

    # A scan and not a map: the gradients of keys and values are then one running sum.
    mixed = lax.map(lambda block: one_block(*block), (split, bias_blocks, visible_blocks, jnp.arange(blocks)))
    return jnp.moveaxis(mixed, 0, 1).reshape(b, blocks * block_size, heads, -1)[:, :queries]


def _split_bias(bias, blocks, block_size, padding):
    padded = jnp.pad(bias, ((0, 0), (0, 0), (0, padding), (0, 0)))
    b, h, _, k = padded.shape
    return jnp.moveaxis(padded.reshape(b, h, blocks, block_size, k), 2, 0)


def _cudnn(query, key, value, bias, key_mask, visible, causal, scaled):
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        raise ValueError(
            f"attention: cudnn needs float16 or bfloat16, got {query.dtype}; set compute_dtype or use 'xla'"
        )
    mask = _seen(_mask(key_mask, causal, query.shape[1], key.shape[1]), visible)
    scale = None if scaled else 1.0
    return jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask, scale=scale, implementation="cudnn")


class Attention(eqx.Module):
    """Multi-head attention with separate projections of query, key and value.

    ``dropout`` is applied to the output projection (the weights themselves are never dropped: fused
    kernels do not offer it, and ViT, DeiT and BERT-sized fine-tuning do not need it). ``use_out_bias`` None: as
    ``use_bias``. ``inner_width`` None: the heads share ``width`` between them. Not ``scaled`` is T5's: logits are bare
    products, and 1/sqrt(d) is in the first weights of the queries instead.
    """

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    num_heads: int = eqx.field(static=True)
    dropout: float = eqx.field(static=True)
    scaled: bool = eqx.field(static=True)
    implementation: Implementation = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        kv_width: int | None = None,
        inner_width: int | None = None,
        use_bias: bool = True,
        use_out_bias: bool | None = None,
        scaled: bool = True,
        dropout: float = 0.0,
        implementation: Implementation = "xla",
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray,
    ):
        inner = width if inner_width is None else inner_width
        if inner % num_heads:
            raise ValueError(f"Attention: width {inner} cannot be split into {num_heads} heads of equal size")
        keys = jax.random.split(key, 4)
        kv_width = width if kv_width is None else kv_width
        query_init = init if scaled else lambda key, shape: init(key, shape) / math.sqrt(inner // num_heads)
        self.query = Linear(width, inner, use_bias=use_bias, init=query_init, key=keys[0])
        self.key = Linear(kv_width, inner, use_bias=use_bias, init=init, key=keys[1])
        self.value = Linear(kv_width, inner, use_bias=use_bias, init=init, key=keys[2])
        out_bias = use_bias if use_out_bias is None else use_out_bias
        self.out = Linear(inner, width, use_bias=out_bias, init=init, key=keys[3])
        self.num_heads = num_heads
        self.dropout = dropout
        self.scaled = scaled
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
        queries = self.queries(flat, batch)
        keys, values = self.keys_values(flat_key, flat_value, batch)
        return self.mixed(queries, keys, values, bias=bias, key_mask=key_mask, causal=causal, train=train, key=key)

    def queries(self, flat: Float[Array, "bq i"], batch) -> Queries:
        """The first of the three steps of ``__call__``, for those who keep keys and values; tokens in one row."""
        return self._heads(self.query(flat), batch)

    def keys_values(
        self, flat: Float[Array, "bk e"], flat_value: Float[Array, "bk e"], batch
    ) -> tuple[Keys, Float[Array, "b k h d"]]:
        """The second: what later queries may read again."""
        return self._heads(self.key(flat), batch), self._heads(self.value(flat_value), batch)

    def mixed(
        self,
        queries: Queries,
        keys: Keys,
        values: Float[Array, "b k h d"],
        *,
        bias: Bias | None = None,
        key_mask: KeyMask | None = None,
        visible: Visible | None = None,
        causal: bool = False,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b q w"]:
        """The third: values by softmax, and the output's projection."""
        mixed = attention(
            queries,
            keys,
            values,
            bias=bias,
            key_mask=key_mask,
            visible=visible,
            causal=causal,
            scaled=self.scaled,
            implementation=self.implementation,
        )
        inner = mixed.shape[2] * mixed.shape[3]
        return dropout(self.out(mixed.reshape(*mixed.shape[:2], inner)), self.dropout, train=train, key=key)

    def _heads(self, x: Float[Array, "bn d"], batch) -> Float[Array, "b n h e"]:  # no int in jax.export: a symbol
        return x.reshape(batch, -1, self.num_heads, x.shape[-1] // self.num_heads)
