"""The loss of CenterNet (Zhou et al. 2019): a focal loss of heatmaps, L1 of size and offset in the cells of centres.

Normalisers are global, as in ``set_prediction``: ``center_counts`` gives the sums of one device, known from the targets
alone, the caller adds them up and hands them to ``center_loss``, whose value is then this device's share: the sum of
the shares is the loss of the whole batch. The published code divides on each card by that card's numbers.

What the published code does otherwise: it cuts boxes off one cell before the border of the map (here at the image's
border, so that padding changes nothing), and it learns that there is nothing in the padding (here its cells have no
loss, and decoding leaves them out).

Images of weight 0 and invalid targets may hold anything, NaN included, and change neither loss nor gradients. Boxes
without area inside the image are left out. What must not pass in silence makes the loss NaN: a valid object whose
label is no class, whose box is not finite, or whose centre lies outside the maps (the wrong stride).
"""

from dataclasses import dataclass, fields
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eqvision.layers.sine_position import size_mask
from eqvision.losses.reduce import mask_rows
from eqvision.names import nearest
from eqvision.ops.boxes import clip_boxes, xyxy_to_cxcywh
from eqvision.ops.heatmap import RadiusRule, draw_peaks, gaussian_radius, read_cells
from eqvision.types import CenterPredictions, DetectionTargets

SMALLEST_PROBABILITY = 1e-4  # nearer to 0 and 1 there is no gradient, as published


@dataclass(frozen=True)
class CenterNetConfig:
    """Weights of the loss and how its heatmaps are drawn; the defaults are the paper's.

    Raises ValueError for a negative number, a stride below 1 and an overlap outside (0, 1), UnknownNameError for an
    unknown rule.
    """

    heatmap_weight: float = 1.0
    """Factor of the focal loss of heatmaps."""
    size_weight: float = 0.1
    """Factor of the L1 distance of widths and heights, in cells."""
    offset_weight: float = 1.0
    """Factor of the L1 distance of the places of centres inside their cells."""
    focal_alpha: float = 2.0
    """Exponent that spares the cells that are right already."""
    focal_beta: float = 4.0
    """Exponent that spares the cells near a centre."""
    min_overlap: float = 0.7
    """Overlap that a box keeps whose corners are off by the radius of the gaussian, in (0, 1)."""
    radius: RadiusRule = "published"
    """published: as CenterNet's code computes the radius, too large. exact: as the paper defines it."""
    stride: int = 4
    """Pixels per cell of the model's maps."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.type is float):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more.")
        if not 0 < self.min_overlap < 1:
            raise ValueError(f"min_overlap is {self.min_overlap}; expected a value between 0 and 1, commonly 0.7.")
        if self.radius not in get_args(RadiusRule):
            raise nearest(self.radius, list(get_args(RadiusRule)), "radius")
        if self.stride < 1:
            raise ValueError(f"stride is {self.stride}; expected 1 or more, and 4 for the published models.")


CENTERNET_LOSS = CenterNetConfig()


class CenterCounts(NamedTuple):
    """What the loss is divided by: cells of a class that hold a centre (or several), and objects."""

    centers: Float[Array, ""]
    objects: Float[Array, ""]


class CenterTargets(NamedTuple):
    """What the maps shall say. ``cells`` are (row, column), ``sizes`` and ``offsets`` (x, y) as in the predictions.

    ``weights`` are 0 for rows that are no object.
    """

    heatmap: Float[Array, "b h w k"]
    cells: Int[Array, "b g 2"]
    sizes: Float[Array, "b g 2"]
    offsets: Float[Array, "b g 2"]
    weights: Float[Array, "b g"]


def center_counts(
    targets: DetectionTargets,
    size: Int[Array, "b 2"],
    weights: Float[Array, " b"],
    config: CenterNetConfig = CENTERNET_LOSS,
) -> CenterCounts:
    """Counts of the rows given. Sum them over devices, as by ``jax.tree.map(global_sum, counts)``."""
    objects = _objects(targets, size, weights, config.stride)
    keys = jnp.concatenate([objects.cells, objects.labels[..., None]], axis=-1)
    same = (keys[:, :, None] == keys[:, None]).all(axis=-1) & objects.valid[:, None]
    repeated = jnp.tril(same, -1).any(axis=-1)  # another object before has the same cell and class
    return CenterCounts(jnp.where(repeated, 0.0, objects.weights).sum(), objects.weights.sum())


def center_targets(
    targets: DetectionTargets,
    size: Int[Array, "b 2"],
    weights: Float[Array, " b"],
    map_size: tuple[int, int],
    num_classes: int,
    config: CenterNetConfig = CENTERNET_LOSS,
) -> CenterTargets:
    """Targets for maps of ``map_size`` (height, width). Extents are rounded up for the radius, and it is rounded down.

    ``size`` is height and width of the images without padding, ``weights`` 0 for images that only pad the batch.
    """
    objects = _objects(targets, size, weights, config.stride)
    extents = jnp.ceil(objects.boxes_cxcywh[..., 2:])
    radii = gaussian_radius(extents, min_overlap=config.min_overlap, rule=config.radius).astype(jnp.int32)
    heatmap = draw_peaks(
        objects.cells, radii, objects.labels, objects.valid, map_size=map_size, num_classes=num_classes
    )
    offsets = objects.boxes_cxcywh[..., :2] - objects.cells[..., ::-1]
    return CenterTargets(heatmap, objects.cells, objects.boxes_cxcywh[..., 2:], offsets, objects.weights)


def center_loss(
    predictions: CenterPredictions,
    targets: DetectionTargets,
    size: Int[Array, "b 2"],
    weights: Float[Array, " b"],
    counts: CenterCounts,
    config: CenterNetConfig = CENTERNET_LOSS,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """This device's share of the loss, and of its terms ``heatmap``, ``size`` and ``offset``, before their factors.

    The arguments are those of ``center_targets`` and the global sums of ``center_counts``. Terms are averages over the
    stacks of the predictions. Without a single object, the heatmaps' loss is divided by 1. Raises ValueError unless
    predictions and targets are of the same batch.
    """
    *_, height, width, num_classes = predictions.logits.shape
    images, rows = predictions.logits.shape[1], targets.boxes.shape[0]
    if images != rows:
        raise ValueError(f"predictions are of {images} images and targets of {rows}; expected the same batch.")
    wanted = center_targets(targets, size, weights, (height, width), num_classes, config)
    inside = size_mask(size, (height * config.stride, width * config.stride), (height, width))
    each = jnp.where(inside, weights.astype(jnp.float32)[:, None, None], 0.0)
    heat = _focal(predictions.logits, wanted.heatmap, each, config) / jnp.maximum(counts.centers, 1.0)
    wrong = _wrong(targets, wanted, weights, num_classes, (height, width))
    terms = {
        "heatmap": jnp.where(wrong, jnp.nan, heat),
        "size": _l1(predictions.sizes, wanted.sizes, wanted, counts),
        "offset": _l1(predictions.offsets, wanted.offsets, wanted, counts),
    }
    factors = (config.heatmap_weight, config.size_weight, config.offset_weight)
    return jnp.stack([f * terms[name] for f, name in zip(factors, terms, strict=True)]).sum(), terms


class _Objects(NamedTuple):
    """Objects in cells. Every row is harmless: what is not used has weight 0, label 0 and an empty box."""

    boxes_cxcywh: Float[Array, "b g 4"]
    cells: Int[Array, "b g 2"]
    labels: Int[Array, "b g"]
    weights: Float[Array, "b g"]

    @property
    def valid(self) -> Bool[Array, "b g"]:
        return self.weights != 0


def _objects(targets: DetectionTargets, size: Int[Array, "b 2"], weights: Float[Array, " b"], stride: int) -> _Objects:
    each = jnp.where(targets.valid, weights.astype(jnp.float32)[:, None], 0.0)
    boxes = clip_boxes(mask_rows(targets.boxes, each), mask_rows(size, weights)) / stride
    each = jnp.where((boxes[..., 2:] > boxes[..., :2]).all(axis=-1), each, 0.0)
    boxes_cxcywh = mask_rows(xyxy_to_cxcywh(boxes), each)
    cells = jnp.floor(boxes_cxcywh[..., 1::-1]).astype(jnp.int32)
    return _Objects(boxes_cxcywh, cells, mask_rows(targets.labels, each), each)


def _focal(
    logits: Float[Array, "l b h w k"],
    heatmap: Float[Array, "b h w k"],
    weights: Float[Array, "b h w"],
    config: CenterNetConfig,
) -> Float[Array, ""]:
    """Sum over images, cells and classes, mean over stacks (Law and Deng 2018, equation 1)."""
    logits = jnp.where((weights != 0)[..., None], logits.astype(jnp.float32), 0.0)
    p = jnp.clip(jax.nn.sigmoid(logits), SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    centers = _power(1 - p, config.focal_alpha) * jnp.log(p)
    others = _power(1 - heatmap, config.focal_beta) * _power(p, config.focal_alpha) * jnp.log1p(-p)
    return -(jnp.where(heatmap == 1, centers, others) * weights[..., None]).sum() / len(logits)


def _power(x: Float[Array, "..."], exponent: float) -> Float[Array, "..."]:
    """By multiplication where the exponent is a whole number, which is faster."""
    return x ** (int(exponent) if exponent.is_integer() else exponent)


def _l1(
    maps: Float[Array, "l b h w 2"], wanted: Float[Array, "b g 2"], targets: CenterTargets, counts: CenterCounts
) -> Float[Array, ""]:
    """Mean over objects, both numbers of each and stacks."""
    found = read_cells(maps.astype(jnp.float32), targets.cells)
    difference = jnp.where((targets.weights != 0)[..., None], found - wanted, 0.0)
    total = (jnp.abs(difference) * targets.weights[..., None]).sum() / len(maps)
    return total / (2 * counts.objects + 1e-4)  # the published code's guard against none


def _wrong(
    targets: DetectionTargets,
    wanted: CenterTargets,
    weights: Float[Array, " b"],
    num_classes: int,
    map_size: tuple[int, int],
) -> Bool[Array, ""]:
    valid = targets.valid & (weights != 0)[:, None]
    unknown = (targets.labels < 0) | (targets.labels >= num_classes)
    endless = ~jnp.isfinite(targets.boxes).all(axis=-1)
    outside = (wanted.weights != 0) & (wanted.cells >= jnp.asarray(map_size)).any(axis=-1)
    return ((valid & (unknown | endless)) | outside).any()
