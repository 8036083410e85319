"""Heatmaps with a peak at the centre of each object, one for each class (CenterNet): how they are drawn and read."""

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from eqvision.names import nearest

RadiusRule = Literal["published", "exact"]


def gaussian_radius(
    size: Float[Array, "... 2"], *, min_overlap: float = 0.7, rule: RadiusRule = "published"
) -> Float[Array, "..."]:
    """How far the corners of boxes of ``size`` (height, width) may be off, in the same unit; 0 for empty boxes.

    ``exact`` is what the papers say (Law and Deng 2018, section 3.2): whichever way each corner moves by so much, up
    and down and sideways, the box overlaps with the old one by ``min_overlap`` at least. ``published`` is what the code
    of CornerNet and CenterNet computes, and what its weights have been trained with: it solves the same three quadratic
    equations and forgets to divide by their leading coefficients. The smallest of its three results is always that of
    the box that grows on both sides, and 4 * ``min_overlap`` times too large.

    Neither is rounded; CenterNet rounds the size up and the radius down. Raises ValueError for an overlap outside
    (0, 1), UnknownNameError for an unknown rule.
    """
    if not 0 < min_overlap < 1:
        raise ValueError(f"min_overlap is {min_overlap}; expected a value between 0 and 1, commonly 0.7.")
    if rule not in get_args(RadiusRule):
        raise nearest(rule, list(get_args(RadiusRule)), "rule of the radius")
    size = jnp.maximum(size.astype(jnp.float32), 0.0)
    around, area = size.sum(axis=-1), size.prod(axis=-1)
    grown = _root(4 * min_overlap, 2 * min_overlap * around, -(1 - min_overlap) * area)
    if rule == "published":
        return 4 * min_overlap * grown
    moved = _root(1.0, -around, (1 - min_overlap) / (1 + min_overlap) * area)
    shrunk = _root(4.0, -2 * around, (1 - min_overlap) * area)
    return jnp.minimum(jnp.minimum(moved, shrunk), grown)


def _root(a: float, b: Float[Array, "..."], c: Float[Array, "..."]) -> Float[Array, "..."]:
    """The smallest positive root of a x^2 + b x + c, without the cancellation of the usual formula; 0 if all are 0.

    For b > 0 > c, and for b < 0 < c.
    """
    whole = jnp.abs(b) + jnp.sqrt(jnp.maximum(b * b - 4 * a * c, 0.0))
    return 2 * jnp.abs(c) / jnp.where(whole > 0, whole, 1.0)


def draw_peaks(
    cells: Int[Array, "b g 2"],
    radii: Int[Array, "b g"],
    labels: Int[Array, "b g"],
    valid: Bool[Array, "b g"],
    *,
    map_size: tuple[int, int],
    num_classes: int,
) -> Float[Array, "b h w {num_classes}"]:
    """Heatmaps with a gaussian around the cell (row, column) of each valid object; the larger counts where two meet.

    The gaussian is 1 at its cell, has a deviation of a sixth of the diameter 2 * radius + 1, and is cut off outside the
    square of that width; what lies outside the map is left out, and so are objects whose label is no class. Rows that
    are not valid may hold anything. ``map_size`` is (height, width). All objects are drawn at once, which takes
    g * h * w numbers for each image beside the result.
    """
    radii = jnp.where(valid, radii, 0)
    columns = _profiles(jnp.where(valid, cells[..., 1], 0), radii, map_size[1])
    peaks = _profiles(jnp.where(valid, cells[..., 0], 0), radii, map_size[0])[..., :, None] * columns[..., None, :]
    wanted = valid & (labels >= 0)  # below zero counts from the end
    places = jnp.where(wanted, labels, num_classes)
    images = jnp.arange(len(places))[:, None]
    maps = jnp.zeros((len(places), num_classes, *map_size), jnp.float32)
    return jnp.moveaxis(maps.at[images, places].max(peaks, mode="drop"), 1, -1)


def _profiles(cells: Int[Array, "b g"], radii: Int[Array, "b g"], length: int) -> Float[Array, "b g {length}"]:
    """The gaussian along one axis; that in the plane is the product of two."""
    distance = jnp.arange(length) - cells[..., None]
    deviation = (2 * radii + 1)[..., None].astype(jnp.float32) / 6
    values = jnp.exp(-0.5 * jnp.square(distance / deviation))
    return jnp.where(jnp.abs(distance) <= radii[..., None], values, 0.0)


def keep_peaks(heatmap: Float[Array, "b h w k"], *, window: int = 3) -> Float[Array, "b h w k"]:
    """0 wherever a cell of the ``window`` around is higher; neighbours that are equally high all stay.

    ``window`` is odd. CenterNet does this in place of a suppression of boxes.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window {window} has no cell in its middle; expected an odd number, commonly 3.")
    largest = lax.reduce_window(heatmap, -jnp.inf, lax.max, (1, window, window, 1), (1, 1, 1, 1), "SAME")
    return jnp.where(heatmap == largest, heatmap, jnp.zeros((), heatmap.dtype))


class Peaks(NamedTuple):
    """The highest cells (row, column) of heatmaps with their values and classes, best first."""

    scores: Float[Array, "b n"]
    labels: Int[Array, "b n"]
    cells: Int[Array, "b n 2"]


def top_peaks(heatmap: Float[Array, "b h w k"], count: int = 100) -> Peaks:
    """The ``count`` highest cells of each class, and of those the highest of all, as CenterNet does it.

    There are fewer where the heatmap has fewer numbers. Among equals the lower class comes first, then the upper row,
    then the column further left.
    """
    b, height, width, k = heatmap.shape
    by_class = jnp.moveaxis(heatmap, -1, 1).reshape(b, k, height * width)
    scores, places = lax.top_k(by_class, min(count, height * width))
    each = scores.shape[-1]
    scores, order = lax.top_k(scores.reshape(b, k * each), min(count, k * each))
    places = jnp.take_along_axis(places.reshape(b, k * each), order, axis=1)
    cells = jnp.stack([places // width, places % width], axis=-1)
    return Peaks(scores, (order // each).astype(jnp.int32), cells.astype(jnp.int32))


def read_cells(maps: Float[Array, "*l b h w c"], cells: Int[Array, "b n 2"]) -> Float[Array, "*l b n c"]:
    """What stands at the cells (row, column) of each image; cells outside the map read the nearest inside."""
    height, width = maps.shape[-3:-1]
    rows, columns = jnp.clip(cells[..., 0], 0, height - 1), jnp.clip(cells[..., 1], 0, width - 1)
    return maps[..., jnp.arange(len(cells))[:, None], rows, columns, :]
