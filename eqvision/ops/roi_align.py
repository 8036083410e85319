"""RoIAlign: maps under boxes, resampled to a fixed number of bins (He et al. 2017), over the levels of a pyramid.

The numbers are those of torchvision's ``roi_align`` and detectron2's ``ROIAlign``, borders, empty boxes and boxes
outside the image included. All levels and images lie in one table of cells, and a loop takes one sample of every bin
at a time, with four gathers that XLA merges with their sum. For 512 boxes on a 1024 x 1024 image and 256 channels this
plans 92 MB of temporaries, which are that table; gathering all samples at once 500 MB and more time, products with
interpolation matrices for each level 2.7 GB and ten times the time (benchmarks/detection_ops.py, on processors).
"""

import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Shaped

from eqvision.names import nearest
from eqvision.ops.collectives import vary_like
from eqvision.types import Features

LevelRule = Literal["torchvision", "detectron2", "mmdet"]

CANONICAL_SIZE, CANONICAL_LEVEL = 224.0, 4  # a box of the size of ImageNet's images belongs to stride 16
MAX_SAMPLES = 64  # a bin and axis: enough for a box of 1792 pixels in 7 bins at stride 4
MOST_CELLS = 2**31 - 1


class RoIFeatures(NamedTuple):
    """``values`` are zeros for rows that are not valid; ``overflow``: the bins of a row ask for more samples than the
    limit and were given evenly spread ones, as many as that.
    """

    values: Float[Array, "b r p p c"]
    overflow: Bool[Array, "b r"]


class Boxes(NamedTuple):
    """Boxes in cells of the map that each is read from; pairs are (y, x). ``offset`` is the map's first table row.

    ``start`` is where the first bin begins, 0 being the centre of the first cell; ``samples`` are 0 where nothing
    is to be read.
    """

    start: Float32[Array, "n 2"]
    bin_size: Float32[Array, "n 2"]
    samples: Int32[Array, "n 2"]
    map_size: Int32[Array, "n 2"]
    offset: Int32[Array, " n"]


class Plan(NamedTuple):
    """What is known when the program is compiled; ``trips`` is the samples of a bin, None where boxes differ in it."""

    bins: int
    trips: int | None
    block_size: int
    cells: int


def roi_align(
    features: Features,
    boxes: Float[Array, "b r 4"],
    levels: Int[Array, "b r"],
    *,
    strides: tuple[int | float, ...],
    bins: int,
    sampling_ratio: int = 0,
    aligned: bool = True,
    valid: Bool[Array, "b r"] | None = None,
    max_samples: int = MAX_SAMPLES,
    block_size: int = 64,
) -> RoIFeatures:
    """Mean of bilinear samples in each of ``bins`` x ``bins`` parts of each box, from level ``levels`` of its image.

    ``boxes`` are xyxy in pixels, divided by the ``strides`` of ``features`` to give cells. Each bin takes
    ``sampling_ratio`` samples along each axis, or with 0 as many as its size in cells rounded up, at most
    ``max_samples``. ``aligned`` puts cell centres at half numbers (detectron2, mmdet); without it coordinates are half
    a cell off, and boxes narrower than a cell are widened to one (torchvision's detectors). Samples up to one cell
    outside the map read its border, farther ones zeros. Rows that are not ``valid`` may hold anything.

    Gradients reach the features alone: boxes count as constants. Arithmetic and sums of gradients are float32; values
    have the features' type. ``block_size`` boxes are read at a time, in order of their samples where these
    differ; temporaries are the table of all cells and, in the gradient, 4 * block_size * bins**2 * channels bytes.
    """
    _check(features, strides, bins, sampling_ratio, max_samples, block_size)
    valid = jnp.ones(boxes.shape[:2], bool) if valid is None else valid
    boxes = jnp.where(valid[..., None], lax.stop_gradient(boxes).astype(jnp.float32), 0.0)
    levels = jnp.clip(levels, 0, len(features) - 1)
    table, offsets = _table(features)
    grid, overflow = box_grid(
        (boxes / jnp.asarray(strides, jnp.float32)[levels][..., None]).reshape(-1, 4),
        *_maps(features, levels, offsets),
        bins=bins,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        max_samples=max_samples,
    )
    grid = without(grid, valid.reshape(-1))
    plan = Plan(bins, sampling_ratio**2 or None, block_size, table.shape[0])
    values = pool(vary_like(table, boxes), vary_like(grid, table), plan)
    return RoIFeatures(values.reshape(*valid.shape, *values.shape[1:]), overflow.reshape(valid.shape) & valid)


def fpn_levels(
    boxes: Float[Array, "*n 4"], *, num_levels: int, finest: int = 2, rule: LevelRule = "torchvision"
) -> Int32[Array, "*n"]:
    """For each box (xyxy, pixels) the map of a pyramid to read it from: 0 is the finest, of stride 2**``finest``.

    Lin et al. 2017, equation 1: floor(4 + log2(sqrt(area) / 224)), clamped. The rules differ in the small number that
    keeps exact powers of two from rounding down: torchvision adds 1e-6 to the logarithm, detectron2 1e-8 to the
    quotient, mmdet 1e-6 to the quotient by 56. Empty boxes, and boxes that are not finite, go to the finest level.
    """
    if rule not in get_args(LevelRule):
        raise nearest(rule, list(get_args(LevelRule)), "fpn_levels: rule")
    boxes = lax.stop_gradient(boxes).astype(jnp.float32)
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    side = jnp.sqrt(sides[..., 0] * sides[..., 1])
    level = jnp.floor(_level(side, rule)) - finest
    level = jnp.where(jnp.isfinite(side), level, 0.0)
    return jnp.clip(level, 0, num_levels - 1).astype(jnp.int32)


def _level(side: Float32[Array, "*n"], rule: LevelRule) -> Float32[Array, "*n"]:
    if rule == "torchvision":
        return CANONICAL_LEVEL + jnp.log2(side / CANONICAL_SIZE) + 1e-6
    if rule == "detectron2":
        return CANONICAL_LEVEL + jnp.log2(side / CANONICAL_SIZE + 1e-8)
    return CANONICAL_LEVEL - 2 + jnp.log2(side / (CANONICAL_SIZE / 4) + 1e-6)


def box_grid(
    boxes: Float32[Array, "n 4"],
    map_size: Int32[Array, "n 2"],
    offset: Int32[Array, " n"],
    *,
    bins: int,
    sampling_ratio: int,
    aligned: bool,
    max_samples: int,
) -> tuple[Boxes, Bool[Array, " n"]]:
    """Where the bins of ``boxes`` (xyxy, in cells) lie, and which boxes ask for more samples than ``max_samples``."""
    low, high = boxes[:, 1::-1], boxes[:, :1:-1]  # (y, x)
    side = high - low if aligned else jnp.maximum(high - low, 1.0)
    wanted = jnp.full_like(side, sampling_ratio) if sampling_ratio else jnp.maximum(jnp.ceil(side / bins), 0)
    wanted = jnp.where(jnp.isfinite(wanted), wanted, 0)  # a box that is not finite is given zeros
    limit = sampling_ratio or max_samples
    samples = jnp.minimum(wanted, limit).astype(jnp.int32)
    start = low - 0.5 if aligned else low
    return Boxes(start, side / bins, samples, map_size, offset), jnp.any(wanted > limit, axis=1)


def without(boxes: Boxes, used: Bool[Array, " n"]) -> Boxes:
    """Nothing is read for those that are not ``used``."""
    return boxes._replace(samples=jnp.where(used[:, None], boxes.samples, 0))


def pool(table: Shaped[Array, "cells c"], boxes: Boxes, plan: Plan) -> Float[Array, "n p p c"]:
    """The mean of the samples of each bin, from maps that lie row by row in ``table``; float32 if that has integers."""
    if jnp.issubdtype(table.dtype, jnp.floating):
        return _pool(table, boxes, plan)
    return _pooled(table, boxes, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pool(table: Float[Array, "cells c"], boxes: Boxes, plan: Plan) -> Float[Array, "n p p c"]:
    """Its gradient is written by hand: loops whose length depends on the data have none in JAX, and the gradient of
    a loop over blocks would add a whole table for each of them.
    """
    return _pooled(table, boxes, plan).astype(table.dtype)


def _pool_forward(table: Float[Array, "cells c"], boxes: Boxes, plan: Plan):
    return _pool(table, boxes, plan), (boxes, table[:0])


def _pool_backward(plan: Plan, saved: tuple[Boxes, Float[Array, "0 c"]], gradient: Float[Array, "n p p c"]):
    boxes, like = saved
    table = vary_like(jnp.zeros((plan.cells, gradient.shape[-1]), jnp.float32), gradient)
    ordered, order = _ordered(boxes, plan)
    blocks = _split(ordered, plan), _split(gradient if order is None else gradient[order], plan)
    table = lax.scan(lambda table, block: (_spread(table, *block, plan), None), table, blocks)[0]
    return table.astype(like.dtype), None


_pool.defvjp(_pool_forward, _pool_backward)


def _pooled(table: Shaped[Array, "cells c"], boxes: Boxes, plan: Plan) -> Float32[Array, "n p p c"]:
    ordered, order = _ordered(boxes, plan)
    values = lax.map(lambda block: _gathered(table, block, plan), _split(ordered, plan))
    values = values.reshape(-1, *values.shape[2:])[: len(boxes.offset)]
    return values if order is None else jnp.zeros_like(values).at[order].set(values, unique_indices=True)


def _gathered(table: Shaped[Array, "cells c"], boxes: Boxes, plan: Plan) -> Float32[Array, "n p p c"]:
    """One block."""

    def add(number, total):
        for cell, share in _corners(boxes, number, plan.bins):
            total = total + table.at[cell].get(mode="promise_in_bounds").astype(jnp.float32) * share[..., None]
        return total

    shape = (len(boxes.offset), plan.bins, plan.bins, table.shape[1])
    total = lax.fori_loop(0, _trips(boxes, plan), add, vary_like(jnp.zeros(shape), boxes.start))
    return total / _count(boxes)[:, None, None, None]


def _spread(
    table: Float32[Array, "cells c"], boxes: Boxes, gradient: Float[Array, "n p p c"], plan: Plan
) -> Float32[Array, "cells c"]:
    """The transpose of ``_gathered``, added to ``table``."""
    gradient = gradient.astype(jnp.float32) / _count(boxes)[:, None, None, None]

    def add(number, table):
        for cell, share in _corners(boxes, number, plan.bins):
            table = table.at[cell].add(gradient * share[..., None], mode="promise_in_bounds")
        return table

    return lax.fori_loop(0, _trips(boxes, plan), add, table)


def _trips(boxes: Boxes, plan: Plan) -> int | Int32[Array, ""]:
    return jnp.max(jnp.prod(boxes.samples, axis=1), initial=0) if plan.trips is None else plan.trips


def _count(boxes: Boxes) -> Float32[Array, " n"]:
    return jnp.maximum(jnp.prod(boxes.samples, axis=1), 1).astype(jnp.float32)


def _corners(boxes: Boxes, number: Int[Array, ""], bins: int):
    """Sample ``number`` of all bins: the table rows (n, bins, bins) of its four cells and their shares.

    Samples count along x first; where a box has fewer, all shares are 0.
    """
    columns = jnp.maximum(boxes.samples[:, 1], 1)
    row = number // columns
    cells_y, shares_y = _axis(boxes, 0, row, bins)
    cells_x, shares_x = _axis(boxes, 1, number - row * columns, bins)
    live = (row < boxes.samples[:, 0]) & (boxes.samples[:, 1] > 0)
    shares_y = shares_y * live[:, None, None]
    first = boxes.offset[:, None] + cells_y.transpose(2, 0, 1) * boxes.map_size[:, 1:]
    return [
        (first[i][:, :, None] + cells_x[:, None, :, j], shares_y[:, :, None, i] * shares_x[:, None, :, j])
        for i in range(2)
        for j in range(2)
    ]


def _axis(
    boxes: Boxes, axis: int, number: Int32[Array, " n"], bins: int
) -> tuple[Int32[Array, "n p 2"], Float32[Array, "n p 2"]]:
    """Along one axis the two cells around the sample ``number`` of each bin, and their shares."""
    size, samples = boxes.map_size[:, axis, None], jnp.maximum(boxes.samples[:, axis], 1)
    within = (number + 0.5) / samples
    bin_number = np.arange(bins, dtype=np.float32) + within[:, None]
    at = boxes.start[:, axis, None] + bin_number * boxes.bin_size[:, axis, None]
    near = (at >= -1) & (at <= size)
    at = jnp.where(near, jnp.clip(at, 0, jnp.maximum(size - 1, 0)), 0)
    low = jnp.floor(at).astype(jnp.int32)
    high = jnp.maximum(jnp.minimum(low + 1, size - 1), 0)
    share = at - low
    return jnp.stack([low, high], axis=-1), jnp.stack([1 - share, share], axis=-1) * near[..., None]


def _ordered(boxes: Boxes, plan: Plan) -> tuple[Boxes, Int32[Array, " n"] | None]:
    """Boxes of like numbers of samples together: a block runs as long as its longest."""
    if plan.trips is not None or len(boxes.offset) <= plan.block_size:
        return boxes, None
    order = jnp.argsort(jnp.prod(boxes.samples, axis=1))
    return jax.tree.map(lambda x: x[order], boxes), order


def _split(tree, plan: Plan):
    """Blocks in front; zeros (which are boxes without samples) fill up the last."""
    count = jax.tree.leaves(tree)[0].shape[0]
    blocks = max(1, -(-count // plan.block_size))
    block = -(-count // blocks)  # of equal size: little is padded

    def split(x):
        padded = jnp.pad(x, ((0, blocks * block - count),) + ((0, 0),) * (x.ndim - 1))
        return padded.reshape(blocks, block, *x.shape[1:])

    return jax.tree.map(split, tree)


def _table(features: Features) -> tuple[Float[Array, "cells c"], Int32[np.ndarray, " levels"]]:
    """All cells of all levels and images, and the first row of each level."""
    sizes = [math.prod(level.shape[:3]) for level in features]
    if sum(sizes) > MOST_CELLS:
        raise ValueError(f"roi_align: {sum(sizes)} cells cannot be numbered in 32 bits; give fewer images at a time")
    cells = [level.reshape(-1, level.shape[3]) for level in features]
    return jnp.concatenate(cells), np.cumsum([0, *sizes[:-1]]).astype(np.int32)


def _maps(features: Features, levels: Int[Array, "b r"], offsets: Int32[np.ndarray, " levels"]):
    """Of each box the (height, width) of its map, and where that begins in the table."""
    images = jnp.arange(levels.shape[0], dtype=jnp.int32)[:, None]
    sizes = jnp.asarray([level.shape[1:3] for level in features], jnp.int32)[levels]
    offset = jnp.asarray(offsets)[levels] + images * jnp.prod(sizes, axis=-1)
    return sizes.reshape(-1, 2), offset.reshape(-1)


def _check(
    features: Features, strides: tuple[int | float, ...], bins: int, ratio: int, max_samples: int, block_size: int
):
    if not features or len(strides) != len(features):
        raise ValueError(f"roi_align: {len(features)} maps with {len(strides)} strides; give one stride for each map")
    if len({level.shape[0] for level in features}) > 1 or len({level.shape[3] for level in features}) > 1:
        raise ValueError(
            f"roi_align: maps have shapes {[level.shape for level in features]}; expected (images, height, width, "
            f"channels) of equal images and channels"
        )
    least = {"bins": (bins, 1), "max_samples": (max_samples, 1), "block_size": (block_size, 1)}
    for name, (value, lowest) in {**least, "sampling_ratio": (ratio, 0)}.items():
        if value < lowest:
            raise ValueError(f"roi_align: {name} must be at least {lowest}, got {value}")
