"""Attention over a map with decomposed relative positions (Li et al. 2022, MViTv2), as in ViTDet and SAM.

To each logit the product of the query with a vector for the distance in rows is added, and one for that in columns.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eqvision.layers.attention import Implementation, attention
from eqvision.layers.init import truncated_normal
from eqvision.layers.linear import Initializer, Linear
from eqvision.ops.torch_resize import resize_bilinear

Grid = tuple[int, int]


class RelativeAttention(eqx.Module):
    """Self-attention of all places of a map; ``rows`` and ``columns`` hold a vector for each distance, for all heads.

    The tables are for maps of ``grid`` (rows, columns), 2 n - 1 distances for a side of n; for another side they are
    resampled linearly. They start at zero. ``grid`` None: no relative positions.
    """

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    rows: Float[Array, "r e"] | None
    columns: Float[Array, "c e"] | None
    num_heads: int = eqx.field(static=True)
    implementation: Implementation = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        grid: Grid | None,
        use_bias: bool = True,
        init: Initializer = truncated_normal,
        implementation: Implementation = "xla",
        key: PRNGKeyArray,
    ):
        if width % num_heads:
            raise ValueError(f"RelativeAttention: width {width} cannot be split into {num_heads} heads of equal size")
        keys = jax.random.split(key, 4)
        self.query = Linear(width, width, use_bias=use_bias, init=init, key=keys[0])
        self.key = Linear(width, width, use_bias=use_bias, init=init, key=keys[1])
        self.value = Linear(width, width, use_bias=use_bias, init=init, key=keys[2])
        self.out = Linear(width, width, init=init, key=keys[3])
        self.rows = None if grid is None else jnp.zeros((2 * grid[0] - 1, width // num_heads))
        self.columns = None if grid is None else jnp.zeros((2 * grid[1] - 1, width // num_heads))
        self.num_heads = num_heads
        self.implementation = implementation

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        b, h, w, d = x.shape
        flat = x.reshape(-1, d)
        query, key, value = (self._heads(layer(flat), b) for layer in (self.query, self.key, self.value))
        bias = None
        if self.rows is not None and self.columns is not None:
            parts = _position_logits(query, (h, w), self.rows, self.columns)
            if self.implementation == "blocked":
                query, key = _appended(query, key, parts, (h, w))
            else:
                bias = _whole_bias(parts)
        mixed = attention(query, key, value, bias=bias, implementation=self.implementation)
        return self.out(mixed.reshape(-1, d)).reshape(x.shape)

    def _heads(self, x: Float[Array, "bn d"], batch) -> Float[Array, "b n h e"]:
        return x.reshape(batch, -1, self.num_heads, x.shape[-1] // self.num_heads)


def _position_logits(
    query: Float[Array, "b n heads e"], grid: Grid, rows: Float[Array, "r e"], columns: Float[Array, "c e"]
) -> tuple[Float[Array, "b heads h w h"], Float[Array, "b heads h w w"]]:
    """What each query adds to its logits for every row of keys, and for every column."""
    (h, w), (b, _, heads, e) = grid, query.shape
    by_place = query.reshape(b, h, w, heads, e)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    table_h, table_w = (vectors(*each).astype(query.dtype) for each in ((rows, h), (columns, w)))
    by_row = jnp.einsum("bhwne,hke->bnhwk", by_place, table_h, preferred_element_type=wide)
    by_column = jnp.einsum("bhwne,wke->bnhwk", by_place, table_w, preferred_element_type=wide)
    return by_row, by_column


def vectors(table: Float[Array, "r e"], side: int) -> Float[Array, "q k e"]:
    """For each query and key of a side the vector of their distance; the table is resampled where it has others."""
    count = 2 * side - 1
    if table.shape[0] != count:
        table = resize_bilinear(table[None, :, None], (count, 1))[0, :, 0]
    return table[_distances(side)]


@functools.cache
def _distances(side: int) -> Int[np.ndarray, "q k"]:
    place = np.arange(side)
    return place[:, None] - place[None, :] + side - 1


def _whole_bias(parts: tuple[Float[Array, "b heads h w h"], Float[Array, "b heads h w w"]]):
    """The sum as (b, heads, h w, h w): XLA forms it inside the softmax and does not store it."""
    by_row, by_column = parts
    b, heads, h, w, _ = by_row.shape
    return (by_row[..., :, None] + by_column[..., None, :]).reshape(b, heads, h * w, h * w)


def _appended(
    query: Float[Array, "b n heads e"],
    key: Float[Array, "b n heads e"],
    parts: tuple[Float[Array, "b heads h w h"], Float[Array, "b heads h w w"]],
    grid: Grid,
) -> tuple[Float[Array, "b n heads f"], Float[Array, "b n heads f"]]:
    """Queries with their position logits appended, and keys with a one at their row and one at their column.

    Their product is the sum of logit and bias: what works through blocks of queries then never sees a bias.
    """
    (h, w), (b, n, heads, e) = grid, query.shape
    # ``attention`` divides by the root of the width, which has grown.
    root = (e + h + w) ** 0.5
    by_row, by_column = (jnp.moveaxis(each, 1, 3).reshape(b, n, heads, -1) * root for each in parts)
    longer = [query * (root / e**0.5), by_row.astype(query.dtype), by_column.astype(query.dtype)]
    place = np.arange(n)
    marks = np.concatenate([np.eye(h)[place // w], np.eye(w)[place % w]], axis=1)
    marks = jnp.broadcast_to(jnp.asarray(marks, key.dtype)[None, :, None], (b, n, heads, h + w))
    return jnp.concatenate(longer, axis=-1), jnp.concatenate([key, marks], axis=-1)
