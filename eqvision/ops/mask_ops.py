"""Masks of objects in and out of boxes: targets cropped to a small square, and predicted squares pasted into images.

On the device in JAX, for all objects of a batch; and in numpy, one object after the other, for data and evaluation.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from eqvision.names import nearest
from eqvision.ops.collectives import vary_like
from eqvision.ops.roi_align import MAX_SAMPLES, MOST_CELLS, Plan, box_grid, pool, without

PasteRule = Literal["detectron2", "torchvision"]

Window = tuple[int, int]  # from, to


class CroppedMasks(NamedTuple):
    """``values`` in [0, 1], zeros for rows that are not valid; ``overflow`` is that of ``RoIFeatures``."""

    values: Float32[Array, "b r m m"]
    overflow: Bool[Array, "b r"]


def crop_masks(
    masks: Shaped[Array, "b g h w"],
    boxes: Float[Array, "b r 4"],
    owners: Int[Array, "b r"],
    *,
    size: int,
    frames: Float[Array, "b g 4"] | None = None,
    aligned: bool = True,
    threshold: float | None = 0.5,
    valid: Bool[Array, "b r"] | None = None,
    max_samples: int = MAX_SAMPLES,
) -> CroppedMasks:
    """Each box's part of mask ``owners`` (a row of ``masks``) at ``size`` x ``size``, by RoIAlign of adaptive sampling.

    With the defaults the targets of detectron2's ``BitMasks.crop_and_resize`` and mmdet's ``BitmapMasks``: 1 where the
    mean is at least ``threshold``. torchvision's are ``aligned=False, threshold=None``: the mean itself.
    ``masks`` (0 and 1, of any type) are those of whole images, or, with ``frames``, small ones of what lies in the
    boxes ``frames``: 100 masks of 1024 x 1024 take 105 MB, of 112 x 112 1.3 MB. Gradients are not computed.
    """
    cells = math.prod(masks.shape[1:])
    if cells > MOST_CELLS:
        raise ValueError(f"crop_masks: {cells} cells of an image cannot be numbered in 32 bits; give frames")
    valid = jnp.ones(owners.shape, bool) if valid is None else valid
    owners = jnp.clip(jnp.where(valid, owners, 0), 0, masks.shape[1] - 1)
    boxes = jnp.where(valid[..., None], boxes.astype(jnp.float32), 0.0)
    if frames is not None:
        boxes, valid = _in_frames(boxes, valid, frames, owners, masks.shape, aligned)
    plan = Plan(size, None, 64, cells)

    def one_image(image):
        masks, boxes, owners, valid = image
        return _crop(masks, boxes, owners, valid, plan, aligned or frames is not None, max_samples)

    values, overflow = lax.map(one_image, lax.stop_gradient((masks, boxes, owners, valid)))
    return CroppedMasks(values if threshold is None else (values >= threshold).astype(jnp.float32), overflow)


def paste_masks(
    masks: Float[Array, "b n m m"],
    boxes: Float[Array, "b n 4"],
    size: tuple[int, int],
    *,
    rule: PasteRule = "detectron2",
    threshold: float | None = 0.5,
    valid: Bool[Array, "b n"] | None = None,
) -> Shaped[Array, "b n h w"]:
    """Probabilities in boxes, at the pixels of an image of ``size`` (height, width): True where they reach a threshold.

    ``detectron2`` (and mmdet) reads each mask bilinearly at the centres of the pixels, with zeros around it, and
    compares by >=. ``torchvision`` surrounds the mask with one row of zeros, widens the box to match, cuts its corners
    to whole numbers (towards 0), resizes the mask to these pixels, and compares by >. With ``threshold=None`` the
    result is float32 and not compared. Empty boxes, rows that are not ``valid``, and pixels outside the image give
    nothing. 100 objects in 800 x 1333 pixels are 107 MB of booleans, or four times that in float32: for evaluation
    ``paste_mask`` and ``pasted_run_lengths`` hold one object at a time.
    """
    _check_rule("paste_masks", rule)
    valid = jnp.ones(boxes.shape[:2], bool) if valid is None else valid
    valid = valid & jnp.all(jnp.isfinite(boxes), axis=-1)
    boxes = jnp.where(valid[..., None], boxes.astype(jnp.float32), 0.0)
    masks = jnp.where(valid[..., None, None], masks.astype(jnp.float32), 0.0)

    def one(row):
        mask, box, used = row
        pixels = [jnp.arange(side, dtype=jnp.float32) for side in size]
        rows, columns = (_shares(box[1 - i], box[3 - i], pixels[i], mask.shape[i], rule, jnp) for i in range(2))
        values = jnp.linalg.multi_dot([rows * used, mask, columns.T], precision=lax.Precision.HIGHEST)
        return _compared(values, rule, threshold)

    pasted = lax.map(one, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (masks, boxes, valid)))
    return pasted.reshape(*boxes.shape[:2], *size)


def paste_mask(
    mask: Float[np.ndarray, "m m"],
    box: Float[np.ndarray, "4"],
    size: tuple[int, int],
    *,
    rule: PasteRule = "detectron2",
    threshold: float | None = 0.5,
) -> Shaped[np.ndarray, "h w"]:
    """``paste_masks`` of one object on the host."""
    values, rows, columns = _pasted_window(mask, box, size, rule, threshold)
    image = np.zeros(size, values.dtype)
    image[slice(*rows), slice(*columns)] = values
    return image


def pasted_run_lengths(
    masks: Float[np.ndarray, "n m m"],
    boxes: Float[np.ndarray, "n 4"],
    size: tuple[int, int],
    *,
    rule: PasteRule = "detectron2",
    threshold: float = 0.5,
) -> Iterator[dict[str, Any]]:
    """``paste_mask`` of one object after the other, as COCO's uncompressed run lengths.

    ``CocoMetric.add_detections(masks=...)`` takes this iterator. Memory is one object's columns of pixels.
    """
    for mask, box in zip(masks, boxes, strict=True):
        values, rows, columns = _pasted_window(mask, box, size, rule, threshold)
        tall = np.zeros((columns[1] - columns[0], size[0]), bool)
        tall[:, slice(*rows)] = values.T
        yield {"size": list(size), "counts": _run_lengths(tall.ravel(), columns[0] * size[0], size[0] * size[1])}


def crop_mask(
    mask: Shaped[np.ndarray, "h w"], box: Float[np.ndarray, "4"], size: int, *, aligned: bool = True
) -> Float32[np.ndarray, "{size} {size}"]:
    """``crop_masks`` of one object on the host, without a limit of samples; the mean of each cell, not compared.

    Only the pixels around the box are read: 100 objects of 20 x 20 pixels take 5 ms at a size of 28 and 11 ms at 112.
    """
    x1, y1, x2, y2 = np.asarray(box, np.float64).tolist()
    starts = [low - 0.5 if aligned else low for low in (y1, x1)]
    sides = [side if aligned else max(side, 1.0) for side in (y2 - y1, x2 - x1)]
    if not all(math.isfinite(start) and 0 < side < math.inf for start, side in zip(starts, sides, strict=True)):
        return np.zeros((size, size), np.float32)
    (rows, used_rows), (columns, used_columns) = map(_mean_shares, starts, sides, (size, size), mask.shape)
    values = rows @ mask[used_rows, used_columns] @ columns.T
    return values.astype(np.float32)


# Cropping


def _in_frames(boxes, valid, frames, owners, shape: tuple[int, ...], aligned: bool):
    """Boxes in cells of the small masks of their owners, always aligned; nothing lies in an empty frame."""
    if not aligned:
        sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 1.0)
        boxes = jnp.concatenate([boxes[..., :2], boxes[..., :2] + sides], axis=-1) + 0.5
    frames = jnp.take_along_axis(frames.astype(jnp.float32), owners[..., None], axis=1)
    sides = frames[..., 2:] - frames[..., :2]
    there = jnp.all(jnp.isfinite(sides) & (sides > 0), axis=-1)
    scale = jnp.asarray(shape[:1:-1], jnp.float32) / jnp.where(there[..., None], sides, 1.0)
    boxes = (boxes - jnp.tile(frames[..., :2], 2)) * jnp.tile(scale, 2)
    return jnp.where(there[..., None], boxes, 0.0), valid & there


def _crop(masks: Shaped[Array, "g h w"], boxes, owners, valid, plan: Plan, aligned: bool, max_samples: int):
    """One image: each mask is a map of its own."""
    height, width = masks.shape[1:]
    map_size = jnp.broadcast_to(jnp.asarray([height, width], jnp.int32), (len(owners), 2))
    offset = owners.astype(jnp.int32) * (height * width)
    grid, overflow = box_grid(
        boxes, map_size, offset, bins=plan.bins, sampling_ratio=0, aligned=aligned, max_samples=max_samples
    )
    table = vary_like(masks.reshape(-1, 1), boxes)
    values = pool(table, vary_like(without(grid, valid), table), plan)[..., 0]
    return values.astype(jnp.float32), overflow & valid


def _mean_shares(start: float, side: float, bins: int, cells: int) -> tuple[np.ndarray, slice]:
    """How much each cell of a window counts in each bin's mean along one axis, (bins, window); and the window."""
    samples = math.ceil(side / bins)
    at = start + (np.arange(bins * samples) + 0.5) * (side / (bins * samples))
    weight = ((at >= -1) & (at <= cells)) / samples
    at = np.clip(at, 0, cells - 1)
    low = at.astype(np.int64)
    first, end = int(low[0]), min(int(low[-1]) + 2, cells)
    share = (at - low) * weight  # of the cell after ``low``; 0 where there is none
    place = np.repeat(np.arange(bins), samples) * (end - first + 1) + (low - first)
    shares = np.bincount(np.concatenate([place, place + 1]), np.concatenate([weight - share, share]),
                         bins * (end - first + 1) + 1)  # fmt: skip
    return shares[:-1].reshape(bins, -1)[:, : end - first], slice(first, end)


# Pasting; ``xp`` is numpy or jax.numpy


def _shares(low, high, pixels, cells: int, rule: PasteRule, xp: Any):
    """How much each of the mask's cells counts in each of ``pixels``, along one axis: (pixels, cells)."""
    if rule == "torchvision":
        low, high = _whole_numbers(low, high, cells, xp)
        at = (pixels - low + 0.5) * ((cells + 2) / xp.maximum(high - low + 1, 1)) - 0.5
        at = xp.clip(at, 0, cells + 1) - 1  # without the row of zeros
        inside = (pixels >= low) & (pixels <= high)
    else:
        inside = high > low
        at = (pixels + 0.5 - low) / xp.where(inside, high - low, 1) * cells - 0.5
    return xp.maximum(1 - xp.abs(at[:, None] - xp.arange(cells)), 0) * (inside[:, None] if inside.ndim else inside)


def _whole_numbers(low, high, cells: int, xp: Any):
    """The box widened by the row of zeros, in torchvision's order of roundings."""
    half, centre = (high - low) * 0.5 * ((cells + 2) / cells), (high + low) * 0.5
    return xp.trunc(centre - half), xp.trunc(centre + half)


def _compared(values, rule: PasteRule, threshold: float | None):
    if threshold is None:
        return values
    return values >= threshold if rule == "detectron2" else values > threshold


def _pasted_window(
    mask: np.ndarray, box: np.ndarray, size: tuple[int, int], rule: PasteRule, threshold: float | None
) -> tuple[np.ndarray, Window, Window]:
    """The pixels around the box, and from where to where they go in the image."""
    _check_rule("paste_mask", rule)
    box, mask = np.asarray(box, np.float32), np.asarray(mask, np.float32)
    if not np.isfinite(box).all():
        return _compared(np.zeros((0, 0), np.float32), rule, threshold), (0, 0), (0, 0)
    windows = [_window(box[1 - i], box[3 - i], mask.shape[i], size[i], rule) for i in range(2)]
    rows, columns = (
        _shares(box[1 - i], box[3 - i], np.arange(*windows[i], dtype=np.float32), mask.shape[i], rule, np)
        for i in range(2)
    )
    return _compared(rows @ mask @ columns.T, rule, threshold), windows[0], windows[1]


def _window(low: np.float32, high: np.float32, cells: int, side: int, rule: PasteRule) -> Window:
    """The pixels of an axis that the mask can reach."""
    if rule == "torchvision":
        first, last = _whole_numbers(low, high, cells, np)
    else:
        reach = max(0.0, float(high - low)) / (2 * cells) + 0.5
        first, last = np.floor(low - reach), np.ceil(high + reach)
    first, end = (int(np.clip(x, 0, side)) for x in (first, last + 1))
    return first, max(first, end)


def _run_lengths(flat: Bool[np.ndarray, " _"], start: int, total: int) -> list[int]:
    """Of an image that is zero but for ``flat``, which begins at ``start``."""
    changes = np.flatnonzero(np.diff(flat, prepend=False, append=False)) + start
    changes = changes[changes < total]
    return np.diff(changes, prepend=0, append=total).tolist()


def _check_rule(where: str, rule: str) -> None:
    if rule not in get_args(PasteRule):
        raise nearest(rule, list(get_args(PasteRule)), f"{where}: rule")
