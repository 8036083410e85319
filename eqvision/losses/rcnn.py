"""Losses of Faster, Mask and Cascade R-CNN on what ``RCNN.train_outputs`` gives, in the dialects of three libraries.

Divisors count what was drawn, and how much that is depends on the model's own proposals: it is not known before the
forward pass, as it is for set prediction. ``rcnn_counts`` gives the sums of one device, the caller adds them up over
devices and hands them to ``rcnn_loss``, whose value is then this device's share: the shares add up to the loss of the
whole batch, as on one device, if both draw the same (a key for each image does that).

    mine = rcnn_counts(samples, weights)
    counts = whole_batch(jax.tree.map(global_sum, mine), images)
    loss, terms = rcnn_loss(samples, weights, counts, config)

``images`` is the sum of all weights that one update is made from. It differs from those of ``mine``, summed over
devices, only where a batch is accumulated from parts: then each part is divided by its own counts, and its loss is
weighted by its share of the images. That is what accumulation can do in one pass; a loss divided by the counts of all
parts would need the proposals of all before the gradient of the first.

Rows that are not valid and images of weight 0 may hold anything, and change neither loss nor gradients. Without
objects, or with nothing drawn at all, terms are 0 and finite. A label that is no class makes the loss NaN.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from eqvision.losses.boxes import box_l1
from eqvision.losses.centernet2 import center_totals, distance_giou, heatmap_focal
from eqvision.losses.reduce import mask_rows
from eqvision.losses.regression import smooth_l1
from eqvision.types import AnchorSample, BoxSample, CenterSample, MaskSample, RCNNSamples


@dataclass(frozen=True)
class RCNNLossConfig:
    """Weights of the terms and in what dialects differ; the defaults are torchvision's.

    Raises ValueError for a negative number.
    """

    objectness_weight: float = 1.0
    """Factor of the cross entropy of anchors."""
    proposal_weight: float = 1.0
    """Factor of the distance of proposals from objects."""
    class_weight: float = 1.0
    """Factor of the cross entropy of classes."""
    box_weight: float = 1.0
    """Factor of the distance of boxes from objects."""
    mask_weight: float = 1.0
    """Factor of the cross entropy of masks, where the model predicts masks."""
    proposal_beta: float = 1 / 9
    """Distances of differences below this are squared; 0 is L1."""
    box_beta: float = 1 / 9
    """The same of boxes."""
    anchors_per_image: int = 0
    """Anchor terms are divided by this times the images, as in detectron2; 0: by the anchors drawn."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; expected 0 or more.")


TORCHVISION_LOSS = RCNNLossConfig()
DETECTRON2_LOSS = RCNNLossConfig(proposal_beta=0.0, box_beta=0.0, anchors_per_image=256)
MMDET_LOSS = RCNNLossConfig(proposal_beta=0.0, box_beta=0.0)
CENTERNET2_LOSS = RCNNLossConfig(objectness_weight=0.5, box_beta=0.0)
RCNN_LOSSES: dict[str, RCNNLossConfig] = {
    "torchvision": TORCHVISION_LOSS,
    "detectron2": DETECTRON2_LOSS,
    "mmdet": MMDET_LOSS,
    "centernet2": CENTERNET2_LOSS,
}


class RCNNCounts(NamedTuple):
    """What the terms are divided by: images, anchors drawn, boxes drawn in each stage, and boxes with masks.

    Of CenterNet2 ``anchors`` are centres of objects and ``cells`` those that have an object; else that is None.
    """

    images: Float[Array, ""]
    anchors: Float[Array, ""]
    boxes: tuple[Float[Array, ""], ...]
    masks: Float[Array, ""]
    cells: Float[Array, ""] | None = None


def rcnn_counts(samples: RCNNSamples, weights: Float[Array, " b"]) -> RCNNCounts:
    """Of the rows given. Sum them over devices, as by ``jax.tree.map(global_sum, counts)``."""
    weights = weights.astype(jnp.float32)

    def total(valid: Bool[Array, "b n"]) -> Float[Array, ""]:
        return jnp.where(valid, weights[:, None], 0.0).sum()

    first, masks = samples.anchors, samples.masks
    anchors, cells = center_totals(first, weights) if isinstance(first, CenterSample) else (total(first.valid), None)
    return RCNNCounts(
        weights.sum(),
        anchors,
        tuple(total(stage.valid) for stage in samples.boxes),
        jnp.zeros_like(weights.sum()) if masks is None else total(masks.valid),
        cells,
    )


def whole_batch(counts: RCNNCounts, images: Float[Array, ""]) -> RCNNCounts:
    """Counts of a part of a batch of ``images``, as if all parts had drawn alike; the same where it is the only one."""
    parts = jnp.where(counts.images > 0, images / jnp.where(counts.images > 0, counts.images, 1.0), 1.0)
    return jax.tree.map(lambda count: count * parts, counts)


def rcnn_loss(
    samples: RCNNSamples,
    weights: Float[Array, " b"],
    counts: RCNNCounts,
    config: RCNNLossConfig = TORCHVISION_LOSS,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """This device's share of the loss, and of its terms by name, before their factors.

    ``weights`` are 0 for images that only pad the batch. The terms are ``objectness`` and ``proposal`` of the anchors
    (of CenterNet2: focal loss of the heatmap, and GIoU), ``class`` and ``box`` of the last stage, with ``_0``, ``_1``
    those of a cascade's stages before, and ``mask`` where the model predicts masks.
    """
    terms = _first_terms(samples.anchors, weights, counts, config)
    for number, stage in enumerate(samples.boxes):
        suffix = "" if number == len(samples.boxes) - 1 else f"_{number}"
        values = _box_terms(stage, weights, counts.boxes[number], config)
        terms |= {f"{name}{suffix}": value for name, value in values.items()}
    if samples.masks is not None:
        terms["mask"] = _mask_term(samples.masks, weights, counts.masks)
    weight = factors(terms, config)
    return jnp.stack([weight[name] * value for name, value in terms.items()]).sum(), terms


def factors(terms: Iterable[str], config: RCNNLossConfig) -> dict[str, float]:
    """Of each term of ``rcnn_loss``, by its name."""
    return {name: getattr(config, f"{name.split('_')[0]}_weight") for name in terms}


def divisors(terms: Iterable[str], counts: RCNNCounts, config: RCNNLossConfig) -> dict[str, Float[Array, ""]]:
    """What each term of ``rcnn_loss`` was divided by, by its name."""
    return {name: _divisor(name, counts, config) for name in terms}


def _divisor(name: str, counts: RCNNCounts, config: RCNNLossConfig) -> Float[Array, ""]:
    kind, _, stage = name.partition("_")
    if counts.cells is not None and kind in ("objectness", "proposal"):
        return counts.anchors if kind == "objectness" else counts.cells
    if kind in ("objectness", "proposal"):
        return config.anchors_per_image * counts.images if config.anchors_per_image else counts.anchors
    return counts.masks if kind == "mask" else counts.boxes[int(stage) if stage else -1]


def _first_terms(
    sample: AnchorSample | CenterSample, weights: Float[Array, " b"], counts: RCNNCounts, config: RCNNLossConfig
) -> dict[str, Float[Array, ""]]:
    if isinstance(sample, AnchorSample):
        return _anchor_terms(sample, weights, counts, config)
    sums = {"objectness": heatmap_focal(sample, weights), "proposal": distance_giou(sample, weights)}
    return {name: _divided(value, _divisor(name, counts, config)) for name, value in sums.items()}


def _anchor_terms(
    sample: AnchorSample, weights: Float[Array, " b"], counts: RCNNCounts, config: RCNNLossConfig
) -> dict[str, Float[Array, ""]]:
    each = _weights(sample.valid, weights)
    logits = mask_rows(sample.logits.astype(jnp.float32), each)
    values = jax.nn.softplus(logits) - logits * sample.positive
    whole = _divisor("objectness", counts, config)
    return {
        "objectness": _divided((values * each).sum(), whole),
        "proposal": _box_term(sample, weights, whole, config.proposal_beta),
    }


def _box_terms(
    sample: BoxSample, weights: Float[Array, " b"], whole: Float[Array, ""], config: RCNNLossConfig
) -> dict[str, Float[Array, ""]]:
    each = _weights(sample.valid, weights)
    log_p = jax.nn.log_softmax(mask_rows(sample.logits.astype(jnp.float32), each), axis=-1)
    chosen = jnp.take_along_axis(log_p, jnp.maximum(sample.columns, 0)[..., None], axis=-1)[..., 0]
    value = _divided(-(chosen * each).sum(), whole)
    unknown = (sample.columns < 0) & (each != 0)
    return {
        "class": jnp.where(unknown.any(), jnp.nan, value),
        "box": _box_term(sample, weights, whole, config.box_beta),
    }


def _box_term(
    sample: AnchorSample | BoxSample, weights: Float[Array, " b"], whole: Float[Array, ""], beta: float
) -> Float[Array, ""]:
    """Sum over the four differences and all positive rows."""
    each = _weights(sample.valid & sample.positive, weights)
    deltas, targets = (mask_rows(x.astype(jnp.float32), each).reshape(-1, 4) for x in (sample.deltas, sample.targets))
    values = box_l1(deltas, targets) if beta == 0 else 4 * smooth_l1(deltas, targets, beta=beta)
    return _divided((values.reshape(each.shape) * each).sum(), whole)


def _mask_term(sample: MaskSample, weights: Float[Array, " b"], whole: Float[Array, ""]) -> Float[Array, ""]:
    each = _weights(sample.valid, weights)
    logits = mask_rows(sample.logits.astype(jnp.float32), each)
    values = jax.nn.softplus(logits) - logits * mask_rows(sample.targets, each)
    return _divided((values.mean(axis=(2, 3)) * each).sum(), whole)


def _weights(valid: Bool[Array, "b n"], weights: Float[Array, " b"]) -> Float[Array, "b n"]:
    return jnp.where(valid, weights.astype(jnp.float32)[:, None], 0.0)


def _divided(total: Float[Array, ""], whole: Float[Array, ""]) -> Float[Array, ""]:
    """0 where there is nothing to divide."""
    return total / jnp.where(whole > 0, whole, 1.0)
