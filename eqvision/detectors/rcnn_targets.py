"""What an R-CNN is to learn: anchors and boxes drawn at random from those that objects are assigned to.

Everything is of fixed size and without gradient. Rows of targets that are not valid may hold anything. Where an image
gives fewer boxes than are to be drawn, rows are not ``valid``, and repeat those that are: batch norms in the heads
then see boxes only, each about equally often.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from eqvision.detectors.rcnn_dialects import RCNNDialect, SampleRule
from eqvision.ops.box_coder import RPN_WEIGHTS, Weights, encode_boxes
from eqvision.ops.boxes import clip_boxes
from eqvision.ops.iou_assignment import POSITIVE, IouAssignment, IouRule, assign_by_iou, matched_boxes
from eqvision.ops.mask_ops import crop_masks
from eqvision.ops.samplers import sample_balanced
from eqvision.types import DetectionTargets, Proposals


class DrawnAnchors(NamedTuple):
    """``rows`` of anchors, and for each the differences that lead to its object (0 where there is none)."""

    rows: Int[Array, "b s"]
    deltas: Float[Array, "b s 4"]
    positive: Bool[Array, "b s"]
    valid: Bool[Array, "b s"]


class DrawnBoxes(NamedTuple):
    """Boxes to train heads on, those with an object first; ``owner`` is the row of its target."""

    boxes: Float[Array, "b r 4"]
    owner: Int[Array, "b r"]
    goals: Float[Array, "b r 4"]
    """The object's own box, 0 where there is none."""
    positive: Bool[Array, "b r"]
    valid: Bool[Array, "b r"]


def objects_on_image(targets: DetectionTargets, size: Int[Array, "b 2"]) -> DetectionTargets:
    """Boxes cut off at images of ``size`` (height, width); those without area then are not ``valid``.

    So that there is no learning of what is not there. A valid box that is not finite must not pass in silence: it
    becomes the whole image, and the labels of that image become no class, which makes ``rcnn_loss`` NaN.
    """
    boxes = jnp.where(targets.valid[..., None], targets.boxes.astype(jnp.float32), 0.0)
    odd = ~jnp.isfinite(boxes).all(axis=-1)
    boxes = clip_boxes(jnp.where(odd[..., None], jnp.array([0.0, 0.0, jnp.inf, jnp.inf]), boxes), size)
    labels = jnp.where(odd.any(axis=-1, keepdims=True), -1, targets.labels)
    valid = targets.valid & (boxes[..., 2:] > boxes[..., :2]).all(axis=-1)
    return targets._replace(boxes=boxes, labels=labels, valid=valid)


def draw_anchors(
    anchors: Float[Array, "n 4"],
    on_image: Bool[Array, "b n"],
    targets: DetectionTargets,
    *,
    rule: SampleRule,
    keys: Key[Array, " b"],
) -> DrawnAnchors:
    """By overlap, then at random, with a key for each image."""

    def one(on_image, boxes, valid, key):
        assigned = assign_by_iou(anchors, boxes, valid, rule=rule.match, boxes_valid=on_image)
        drawn = sample_balanced(assigned.label, count=rule.count, positive_fraction=rule.positive, key=key)
        rows = _repeated(drawn.indices, drawn.valid)
        goals = matched_boxes(boxes, _at(assigned, rows))
        deltas = jnp.where(drawn.positive[:, None], encode_boxes(goals, anchors[rows], weights=RPN_WEIGHTS), 0.0)
        return DrawnAnchors(rows, deltas, drawn.positive, drawn.valid)

    return jax.vmap(one)(on_image, *_known(targets), keys)


def draw_boxes(
    proposals: Proposals, targets: DetectionTargets, *, rule: SampleRule, keys: Key[Array, " b"]
) -> DrawnBoxes:
    """From proposals and the objects' own boxes, as ``draw_anchors``."""
    known, known_valid = _known(targets)
    candidates = jnp.concatenate([proposals.boxes, jnp.where(known_valid[..., None], known, 0.0)], axis=1)
    valid = jnp.concatenate([proposals.valid, known_valid], axis=1)

    def one(candidates, candidates_valid, boxes, valid, key):
        assigned = assign_by_iou(candidates, boxes, valid, rule=rule.match, boxes_valid=candidates_valid)
        drawn = sample_balanced(assigned.label, count=rule.count, positive_fraction=rule.positive, key=key)
        rows = _repeated(drawn.indices, drawn.valid)
        return _drawn(candidates[rows], _at(assigned, rows), boxes, drawn.positive, drawn.valid)

    return jax.vmap(one)(*lax.stop_gradient((candidates, valid)), known, known_valid, keys)


def match_boxes(
    boxes: Float[Array, "b r 4"], valid: Bool[Array, "b r"], targets: DetectionTargets, *, rule: IouRule
) -> DrawnBoxes:
    """Of a later stage of a cascade: all boxes are trained on, and their objects are assigned anew."""

    def one(candidates, candidates_valid, boxes, valid):
        assigned = assign_by_iou(candidates, boxes, valid, rule=rule, boxes_valid=candidates_valid)
        return _drawn(candidates, assigned, boxes, assigned.label == POSITIVE, assigned.label >= 0)

    return jax.vmap(one)(*lax.stop_gradient((boxes, valid)), *_known(targets))


def box_targets(
    drawn: DrawnBoxes, targets: DetectionTargets, *, dialect: RCNNDialect, num_classes: int, weights: Weights
) -> tuple[Int[Array, "b r"], Float[Array, "b r 4"]]:
    """The column of the class logits that should be high, -1 for a label that is no class, and differences."""
    first = dialect.background == "first"
    labels = jnp.take_along_axis(targets.labels, drawn.owner, axis=1)
    known = (labels >= 0) & (labels < num_classes)
    columns = jnp.where(known, labels + (1 if first else 0), -1)
    columns = jnp.where(drawn.positive, columns, 0 if first else num_classes).astype(jnp.int32)
    deltas = encode_boxes(drawn.goals, drawn.boxes, weights=weights)
    return columns, lax.stop_gradient(jnp.where(drawn.positive[..., None], deltas, 0.0))


def boxes_with_masks(drawn: DrawnBoxes, count: int) -> DrawnBoxes:
    """The first ``count`` rows, where those with an object are; ``valid`` are these alone, repeated in the others."""

    def one(drawn: DrawnBoxes) -> DrawnBoxes:
        positive = drawn.positive[:count]
        chosen = jax.tree.map(lambda x: x[_repeated(jnp.arange(count), positive)], drawn)
        return chosen._replace(positive=positive, valid=positive)

    return jax.vmap(one)(drawn)


def mask_targets(
    drawn: DrawnBoxes, targets: DetectionTargets, *, dialect: RCNNDialect, size: int
) -> Float[Array, "b m size size"]:
    """What of the object's mask lies in each box. Raises ValueError for targets without masks."""
    if targets.masks is None:
        raise ValueError(
            "a Mask R-CNN is trained on masks, and these targets have none; build it without masks, or "
            "give DetectionTargets.masks"
        )
    return crop_masks(
        targets.masks,
        drawn.boxes,
        drawn.owner,
        size=size,
        frames=targets.frames,
        aligned=dialect.aligned,
        threshold=dialect.mask_threshold,
        valid=drawn.valid,
    ).values


def _known(targets: DetectionTargets) -> tuple[Float[Array, "b g 4"], Bool[Array, "b g"]]:
    return targets.boxes.astype(jnp.float32), targets.valid


def _at(assigned: IouAssignment, rows: Int[Array, " r"]) -> IouAssignment:
    return jax.tree.map(lambda x: x[rows], assigned)


def _drawn(candidates, assigned: IouAssignment, boxes, positive, valid) -> DrawnBoxes:
    goals = jnp.where(positive[:, None], matched_boxes(boxes, assigned), 0.0)
    return DrawnBoxes(candidates, jnp.where(positive, assigned.target, 0), goals, positive, valid)


def _repeated(rows: Int[Array, " k"], valid: Bool[Array, " k"]) -> Int[Array, " k"]:
    """The valid ones, which stand in front, again and again; all rows as they are where none is valid."""
    count = jnp.sum(valid)
    return jnp.where(count > 0, rows[jnp.arange(len(rows)) % jnp.maximum(count, 1)], rows)
