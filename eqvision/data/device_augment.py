"""Mixup, CutMix and random erasing on the device: pure functions for the inside of a compiled training step.

They take floating-point images after ``normalize``. Under ``shard_map`` each device changes its own rows with its own
key (fold the device's index into it): images are mixed within a device's share of the batch, never across devices.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from eqvision.losses import label_rows
from eqvision.types import Images, Labels

if TYPE_CHECKING:  # recipes come after data: their type may be named here, their code not imported
    import eqvision.recipes.config

ATTEMPTS = 10  # draws of a region that fits into the image, as in timm


class Shares(NamedTuple):
    """How much of each pixel, and of the label, comes from the partner."""

    pixels: Float[Array, "h w"]
    label: Float[Array, ""]


def augment_batch(
    images: Images,
    labels: Labels,
    weights: Float[Array, " b"],
    key: Key[Array, ""],
    *,
    config: "eqvision.recipes.config.AugmentConfig",
    num_classes: int,
) -> tuple[Images, Float[Array, "b k"]]:
    """All that the configuration asks for on the device: random erasing, then mixup or CutMix (timm's order).

    Labels come as ``mix_batch`` takes them, and go out as rows. Raises TypeError for images of whole numbers,
    ValueError for labels that do not fit.
    """
    erase_key, mix_key = jax.random.split(key)
    images = random_erasing(images, erase_key, probability=config.random_erasing)
    return mix_batch(images, labels, weights, mix_key, config=config, num_classes=num_classes)


def mix_batch(
    images: Images,
    labels: Labels,
    weights: Float[Array, " b"],
    key: Key[Array, ""],
    *,
    config: "eqvision.recipes.config.AugmentConfig",
    num_classes: int,
) -> tuple[Images, Float[Array, "b k"]]:
    """Mixup or CutMix with the reversed batch, one ratio for the batch, as the configuration says.

    ``labels`` are class indices ``[b]``, rows ``[b k]`` or real values ``[b]`` (``num_classes`` 1); rows go out. With
    both alphas above 0, the batch takes CutMix with probability ``cutmix_share``. A row of weight 0, and the row whose
    partner it would be, stay as they are: padding and corrupt images enter nothing. Raises as ``augment_batch``.
    """
    shares = draw_shares(key, _size(images), mixup=config.mixup, cutmix=config.cutmix, cutmix_share=config.cutmix_share)
    return _mix_rows(images, _label_rows(labels, num_classes), weights, shares)


def mixup(
    images: Images,
    labels: Num[Array, "b k"],
    key: Key[Array, ""],
    *,
    alpha: float,
    weights: Float[Array, " b"] | None = None,
) -> tuple[Images, Float[Array, "b k"]]:
    """``r * x + (1 - r) * partner`` for pixels and label rows, ``r`` of Beta(alpha, alpha) (Zhang et al. 2018).

    One ratio for the batch; the partner is the reversed batch. ``alpha`` 0 changes nothing. Rows of weight 0 are
    left out as in ``mix_batch``.
    """
    return _mix_rows(images, labels, weights, draw_shares(key, _size(images), mixup=alpha, cutmix=0.0))


def cutmix(
    images: Images,
    labels: Num[Array, "b k"],
    key: Key[Array, ""],
    *,
    alpha: float,
    weights: Float[Array, " b"] | None = None,
) -> tuple[Images, Float[Array, "b k"]]:
    """A rectangle taken from the partner, and of its label the rectangle's exact share of the area (Yun et al. 2019).

    Sides are ``sqrt(1 - r)`` of the image's with ``r`` of Beta(alpha, alpha); the centre is any pixel, and what hangs
    over the edge is cut off. Otherwise as ``mixup``.
    """
    return _mix_rows(images, labels, weights, draw_shares(key, _size(images), mixup=0.0, cutmix=alpha))


def draw_shares(
    key: Key[Array, ""], size: tuple[int, int], *, mixup: float, cutmix: float, cutmix_share: float = 0.5
) -> Shares | None:
    """The shares of one batch of ``size`` (height, width) for the two alphas; None where both are 0.

    One Beta sampler serves both kinds and one draw gives the rest: random functions take long to compile.
    """
    if not mixup and not cutmix:
        return None
    ratio_key, place_key = jax.random.split(key)
    row, column, choice = jax.random.uniform(place_key, (3,))
    cut = choice < (cutmix_share if mixup and cutmix else float(cutmix > 0))
    alpha = jnp.where(cut, cutmix or mixup, mixup or cutmix)
    ratio = jax.random.beta(ratio_key, alpha, alpha)
    ours, others = cutmix_shares(ratio, row, column, size), mixup_shares(ratio, size)
    return jax.tree.map(lambda a, b: jnp.where(cut, a, b), ours, others)


def mixup_shares(ratio: Float[Array, ""], size: tuple[int, int]) -> Shares:
    """``1 - ratio`` for all pixels and the label."""
    return Shares(jnp.broadcast_to(1 - ratio, size), 1 - ratio)


def cutmix_shares(
    ratio: Float[Array, ""], row: Float[Array, ""], column: Float[Array, ""], size: tuple[int, int]
) -> Shares:
    """1 inside a rectangle about (row, column) in 0..1 and 0 outside; its part of the area for the label."""
    side = jnp.sqrt(1 - ratio)
    inside = _around(row, size[0], side)[:, None] & _around(column, size[1], side)[None, :]
    return Shares(inside.astype(jnp.float32), inside.sum() / (size[0] * size[1]))


def random_erasing(
    images: Images,
    key: Key[Array, ""],
    *,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Images:
    """One rectangle of normal noise in each image, with ``probability`` (Zhong et al. 2020; timm's and DeiT's values).

    Its share of the area is uniform in ``area``, its height / width log-uniform in ``aspect``; an image in which ten
    draws do not fit stays whole. Every pixel and channel gets its own noise, of the normalised images' scale. Raises
    TypeError for images of whole numbers.
    """
    _require_float(images)
    if not probability:
        return images
    b, h, w, _ = images.shape
    place_key, noise_key = jax.random.split(key)
    # One draw for all: each random function would take seconds to compile.
    draws = jax.random.uniform(place_key, (b, 2 * ATTEMPTS + 3))
    inside = jax.vmap(lambda u: _random_rectangle(u, (h, w), area, aspect))(draws[:, 1:])
    chosen = (draws[:, 0] < probability)[:, None, None] & inside
    return jnp.where(chosen[..., None], jax.random.normal(noise_key, images.shape, images.dtype), images)


def _mix_rows(
    images: Images, labels: Num[Array, "b k"], weights: Float[Array, " b"] | None, shares: Shares | None
) -> tuple[Images, Float[Array, "b k"]]:
    _require_float(images)
    rows = labels.astype(jnp.float32)
    if shares is None:
        return images, rows
    used = jnp.ones(len(images), bool) if weights is None else weights != 0
    both = used & used[::-1]
    pixels = shares.pixels[None, :, :, None]
    return _blend(images, pixels, both[:, None, None, None]), _blend(rows, shares.label, both[:, None])


def _blend(x: Float[Array, "b ..."], share: Float[Array, "..."], mixed: Bool[Array, "b ..."]) -> Float[Array, "b ..."]:
    """In float32, whatever the images' type: in bfloat16 the shares of the two would not add up to 1."""
    # The partner is replaced where it may hold NaN, not only masked afterwards: gradients stay finite too.
    partner = jnp.where(mixed, x[::-1], x)
    blended = (1 - share) * x.astype(jnp.float32) + share * partner.astype(jnp.float32)
    return jnp.where(mixed, blended.astype(x.dtype), x)


def _around(centre: Float[Array, ""], length: int, side: Float[Array, ""]) -> Bool[Array, " {length}"]:
    """Pixels nearer than half of ``side * length`` to the one at ``centre`` in 0..1, halves floored as in timm."""
    half = jnp.floor(side * length).astype(jnp.int32) // 2
    middle = jnp.floor(centre * length).astype(jnp.int32)
    pixels = jnp.arange(length)
    return (pixels >= middle - half) & (pixels < middle + half)


def _random_rectangle(
    draws: Float[Array, " n"], size: tuple[int, int], area: tuple[float, float], aspect: tuple[float, float]
) -> Bool[Array, "..."]:
    """The first of ten drawn rectangles that is smaller than the image, by numbers in 0..1; empty where none is."""
    places, areas, logs = draws[:2], draws[2 : 2 + ATTEMPTS], draws[2 + ATTEMPTS :]
    pixels = size[0] * size[1] * (area[0] + (area[1] - area[0]) * areas)
    ratios = aspect[0] * (aspect[1] / aspect[0]) ** logs
    heights = jnp.round(jnp.sqrt(pixels * ratios)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(pixels / ratios)).astype(jnp.int32)
    fits = (heights < size[0]) & (widths < size[1])
    first = jnp.argmax(fits)
    rows, columns = _span(places[0], size[0], heights[first]), _span(places[1], size[1], widths[first])
    return fits.any() & rows[:, None] & columns[None, :]


def _span(place: Float[Array, ""], length: int, extent: Int[Array, ""]) -> Bool[Array, " {length}"]:
    """``extent`` neighbouring pixels among ``length``, first to last possible for ``place`` in 0..1."""
    start = jnp.floor(place * (length - extent + 1)).astype(jnp.int32)
    pixels = jnp.arange(length)
    return (pixels >= start) & (pixels < start + extent)


def _label_rows(labels: Labels, num_classes: int) -> Float[Array, "b k"]:
    if labels.ndim == 1 and jnp.issubdtype(labels.dtype, jnp.floating):
        labels = labels[:, None]
    return label_rows(labels, (len(labels), num_classes))


def _size(images: Images) -> tuple[int, int]:
    _, height, width, _ = images.shape
    return height, width


def _require_float(images: Array) -> None:
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images are {images.dtype}; mixing and erasing work on floating-point images: call normalize first"
        )
