"""Bilinear sampling of several maps at points of one's own choice: the core of deformable attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

Values = tuple[Float[Array, "b _ _ heads d"], ...]
Locations = Float[Array, "b q heads levels points 2"]
Weights = Float[Array, "b q heads levels points"]
Table = Float[Array, "b s d"]  # one head's values, the levels one behind the other


def multi_scale_deformable_sampling(
    values: Values, locations: Locations, weights: Weights, *, block_size: int | None = 16_384, remat: bool = True
) -> Float[Array, "b q heads d"]:
    """For each query and head the weighted sum of samples from all levels (Zhu et al. 2021, equation 3).

    ``values`` are maps (b, h, w, heads, d), one per level. ``locations`` are (x, y) with (0, 0) the outer corner of
    the map's first cell and (1, 1) that of its last. Samples are those of torch's ``grid_sample(mode="bilinear",
    padding_mode="zeros", align_corners=False)`` at 2 * location - 1. ``weights`` are taken as they are.
    Gradients reach all three. Locations and weights are computed in float32, values keep their type.

    At an image of 800 x 1333, an encoder layer would gather 1.5 GB of corners in float32. Therefore heads run one after
    the other, and in each the queries in blocks: ``block_size`` is their number times the images of the batch. One
    block takes block_size * levels * points * d values for each of four corners; None takes all queries and heads
    at once, as is done where these are no more than ``block_size``. With ``remat`` the gradient gathers
    again instead of keeping the corners of all blocks.
    """
    _check(values, locations, weights, block_size)
    table, grid = _flatten(values)
    locations, weights = (x.astype(jnp.float32) for x in (locations, weights))
    b, q, heads = weights.shape[:3]
    samples = functools.partial(_samples, grid=grid)
    # Heads in front: a loop over them then reads and writes whole arrays.
    arrays = tuple(jnp.moveaxis(x, 2, 0) for x in (table, locations, weights))
    if block_size is None or b * q * heads <= block_size:
        samples = jax.checkpoint(samples) if remat else samples
        return jnp.moveaxis(jax.vmap(samples)(*arrays), 0, 2)
    # Inside a loop nothing can be merged with the second gathering, and the guard against that costs time.
    samples = jax.checkpoint(samples, prevent_cse=False) if remat else samples
    one_head = functools.partial(_blocked, samples, block=max(1, block_size // b))
    return jnp.moveaxis(lax.map(lambda head: one_head(*head), arrays), 0, 2)


def _flatten(values: Values) -> tuple[Float[Array, "b s heads d"], tuple[tuple[int, int], ...]]:
    """All levels in one array of cells, and the (height, width) of each."""
    cells = [level.reshape(level.shape[0], -1, *level.shape[3:]) for level in values]
    return jnp.concatenate(cells, axis=1), tuple((level.shape[1], level.shape[2]) for level in values)


def _blocked(samples, table: Table, locations, weights, *, block: int) -> Float[Array, "b q d"]:
    """A loop over blocks of queries; the last block is padded and its extra rows dropped."""
    b, q = weights.shape[:2]
    if q <= block:
        return samples(table, locations, weights)
    blocks = -(-q // block)
    block = -(-q // blocks)  # of equal size: little is padded

    def split(x):
        padded = jnp.pad(x, ((0, 0), (0, blocks * block - q)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(b, blocks, block, *x.shape[2:]), 1, 0)

    mixed = lax.map(lambda part: samples(table, *part), (split(locations), split(weights)))
    return jnp.moveaxis(mixed, 0, 1).reshape(b, blocks * block, -1)[:, :q]


def _samples(
    table: Table,
    locations: Float[Array, "b q levels points 2"],
    weights: Float[Array, "b q levels points"],
    *,
    grid: tuple[tuple[int, int], ...],
) -> Float[Array, "b q d"]:
    """One head: four gathers, one for each corner of the cell squares around the points, and the sum over points.

    One gather of all four corners side by side took longer on processors (benchmarks/results/deformable.md).
    """
    height, width, start = _constants(grid)
    x = locations[..., 0] * width - 0.5
    y = locations[..., 1] * height - 0.5
    # Also keeps what is far outside, or not finite, away from the integers.
    near = (x > -1) & (x < width) & (y > -1) & (y < height)
    x, y, weights = (jnp.where(near, value, 0.0) for value in (x, y, weights))
    left, top = jnp.floor(x), jnp.floor(y)
    total = 0.0
    for row, share_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, share_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            cell = jnp.where(inside, row * width + column, 0.0).astype(jnp.int32) + start  # exact below 2**24 cells
            total = total + _gather(table, cell, jnp.where(inside, share_y * share_x * weights, 0.0))
    return total.astype(table.dtype)


def _constants(grid: tuple[tuple[int, int], ...]):
    """Height, width (float32) and first cell (int32) of each level, shaped to broadcast against (levels, points)."""
    size = np.asarray(grid, np.float32)[:, :, None]
    start = np.cumsum([0, *(h * w for h, w in grid[:-1])]).astype(np.int32)
    return size[:, 0], size[:, 1], start[:, None]


def _gather(
    table: Table, cell: Int[Array, "b q levels points"], share: Float[Array, "b q levels points"]
) -> Float[Array, "b q d"]:
    b, q = cell.shape[:2]
    rows = jax.vmap(lambda cells, index: cells.at[index].get(mode="promise_in_bounds"))(table, cell.reshape(b, q, -1))
    share = share.reshape(b, q, -1).astype(table.dtype)
    return jnp.einsum("bqkd,bqk->bqd", rows, share, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _check(values: Values, locations: Locations, weights: Weights, block_size: int | None) -> None:
    levels = locations.shape[3]
    if len(values) != levels or weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"multi_scale_deformable_sampling: {len(values)} maps of values, locations of {levels} levels (axis 3 of "
            f"{locations.shape}) and weights of shape {weights.shape}; give one map per level and weights shaped as "
            f"the locations without their last axis"
        )
    for number, level in enumerate(values):
        if level.ndim != 5 or level.shape[3] != locations.shape[2] or level.shape[0] != locations.shape[0]:
            raise ValueError(
                f"multi_scale_deformable_sampling: values of level {number} have shape {level.shape}; locations "
                f"{locations.shape} ask for ({locations.shape[0]}, height, width, {locations.shape[2]} heads, channels)"
            )
    if block_size is not None and block_size < 1:
        raise ValueError(f"multi_scale_deformable_sampling: block_size must be at least 1 or None, got {block_size}")
