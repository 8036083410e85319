"""Which anchors or proposals are to predict which object: by overlap, as region-based detectors do it.

Positive from one overlap on, negative below another, ignored between the two; and, where asked for, the best anchors
of an object are positive however low their overlap is.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from eqvision.ops.assignment_problems import first_index
from eqvision.ops.boxes import box_area, pairwise_iou
from eqvision.ops.collectives import vary_like

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1
BITS = 32


class IouRule(NamedTuple):
    """Numbers of one assignment.

    A box is positive from an overlap of ``high`` on, negative below ``low``. With ``low_quality`` the boxes that
    overlap a target most, all of them where several do so equally, are positive as well, if that overlap is above 0
    and at least ``smallest_best``. Such a box keeps the target that it overlaps most itself, or with ``reassign``
    takes the target whose best it is (of several the last).
    """

    low: float
    high: float
    low_quality: bool = False
    smallest_best: float = 0.0
    reassign: bool = False


# As the published R50-FPN models have them; mmdet's Faster R-CNN takes no low-quality matches of proposals.
RPN_RULES: dict[str, IouRule] = {
    "torchvision": IouRule(low=0.3, high=0.7, low_quality=True),
    "detectron2": IouRule(low=0.3, high=0.7, low_quality=True),
    "mmdet": IouRule(low=0.3, high=0.7, low_quality=True, smallest_best=0.3, reassign=True),
}
ROI_RULES: dict[str, IouRule] = {
    "torchvision": IouRule(low=0.5, high=0.5),
    "detectron2": IouRule(low=0.5, high=0.5),
    "mmdet": IouRule(low=0.5, high=0.5),
    "mmdet_mask_rcnn": IouRule(low=0.5, high=0.5, low_quality=True, smallest_best=0.5, reassign=True),
}


class IouAssignment(NamedTuple):
    """Of each box: ``label`` 1 (positive), 0 (negative) or -1 (ignored), the row of its target and their overlap.

    ``target`` is the first target of largest overlap, whatever the label is; 0 where there is no valid one, and
    ``iou`` is 0 then. So it may point at padding, but never where the label is 1.
    """

    label: Int[Array, " n"]
    target: Int[Array, " n"]
    iou: Float[Array, " n"]


def assign_by_iou(
    boxes: Float[Array, "n 4"],
    targets: Float[Array, "g 4"],
    valid: Bool[Array, " g"],
    *,
    rule: IouRule,
    boxes_valid: Bool[Array, " n"] | None = None,
    crowds: Float[Array, "c 4"] | None = None,
    crowds_valid: Bool[Array, " c"] | None = None,
    crowd_overlap: float = 0.5,
    block_size: int = 4096,
) -> IouAssignment:
    """The assignment of one image; ``jax.vmap`` it over images, with the anchors shared or not.

    Targets that are not ``valid`` count for nothing, whatever is in them; without a valid one every box is negative.
    Boxes that are not ``boxes_valid`` are ignored, and are no target's best. Boxes of which more than
    ``crowd_overlap`` lies inside one of ``crowds`` are ignored too, and no target's best, as in mmdet; torchvision
    and detectron2 drop crowds before and have no such rule.

    A target that overlaps no box at all has no best one. (There the references would make every box positive
    that does not touch it; they refuse or drop empty targets before.)

    Boxes are compared ``block_size`` at a time: at 268 569 anchors and 100 targets all overlaps would take 107 MB.
    """
    _check(rule, block_size)
    usable = jnp.ones(boxes.shape[0], bool) if boxes_valid is None else boxes_valid
    boxes, targets = _finite(boxes, usable), _finite(targets, valid)
    if crowds is not None:
        crowds_valid = jnp.ones(crowds.shape[0], bool) if crowds_valid is None else crowds_valid
        usable = usable & ~_inside(boxes, _finite(crowds, crowds_valid), crowd_overlap)
    if boxes.shape[0] == 0 or targets.shape[0] == 0:
        none = jnp.zeros(boxes.shape[0], jnp.int32)
        return IouAssignment(jnp.where(usable, NEGATIVE, IGNORED), none, none.astype(jnp.float32))
    return _assign(boxes, usable, targets, valid, rule=rule, block=min(block_size, boxes.shape[0]))


def matched_boxes(targets: Float[Array, "g 4"], assignment: IouAssignment) -> Float[Array, "n 4"]:
    """The target of each positive box, and zeros for the others: nothing of padding, NaN included, gets through.

    A loss that masks the others afterwards then has finite gradients, which a NaN would spoil even behind a mask.
    """
    return jnp.where((assignment.label == POSITIVE)[:, None], targets[assignment.target], 0.0)


def _check(rule: IouRule, block_size: int) -> None:
    if not 0 <= rule.low <= rule.high <= 1:
        raise ValueError(f"low {rule.low} and high {rule.high}: expected 0 <= low <= high <= 1")
    if block_size < 1:
        raise ValueError(f"block_size {block_size}: expected at least 1 box")


def _finite(boxes: Float[Array, "k 4"], valid: Bool[Array, " k"]) -> Float[Array, "k 4"]:
    """Zeros, which overlap nothing, in rows that do not count."""
    return jnp.where(valid[:, None], lax.stop_gradient(boxes).astype(jnp.float32), 0.0)


def _inside(boxes: Float[Array, "n 4"], crowds: Float[Array, "c 4"], share: float) -> Bool[Array, " n"]:
    """Whether more than ``share`` of a box lies in one of the crowds, one crowd after the other."""
    area = box_area(boxes)

    def covers(crowd):
        corners = jnp.maximum(boxes[:, :2], crowd[:2]), jnp.minimum(boxes[:, 2:], crowd[2:])
        return box_area(jnp.concatenate(corners, axis=-1)) > share * area

    def add(inside, crowd):
        return inside | covers(crowd), None

    return lax.scan(add, vary_like(jnp.zeros_like(area, bool), crowds), crowds)[0]


class _Blocks(NamedTuple):
    """What is kept of each block of overlaps: little for each box, and the best for each target.

    ``bests`` has, for every box, a bit for each target of which it is the best in its block. Once the best of all
    blocks is known, the bits of the winning blocks tell the best boxes without computing an overlap again, which
    might round otherwise the second time and break ties.
    """

    iou: Float[Array, "blocks size"]
    target: Int[Array, "blocks size"]
    bests: UInt32[Array, "blocks size words"]
    best_iou: Float[Array, "blocks g"]


@functools.partial(jax.jit, static_argnames=("rule", "block"))
def _assign(boxes, usable, targets, valid, *, rule: IouRule, block: int) -> IouAssignment:
    """``assign_by_iou`` on arrays without junk."""
    n = boxes.shape[0]
    found = _compare_all(boxes, usable, targets, valid, block)
    iou, target = found.iou.reshape(-1)[:n], found.target.reshape(-1)[:n]
    label = jnp.where(iou >= rule.high, POSITIVE, jnp.where(iou < rule.low, NEGATIVE, IGNORED))
    if rule.low_quality:
        best_of = _best_of(found, rule.smallest_best).reshape(-1)[:n]
        label = jnp.where(best_of >= 0, POSITIVE, label)
        target = jnp.where(best_of >= 0, best_of, target) if rule.reassign else target
    return IouAssignment(jnp.where(usable, label, IGNORED), target, jnp.maximum(iou, 0.0))


def _compare_all(boxes, usable, targets, valid, block: int) -> _Blocks:
    """One block after the other; rows that fill up the last one are not usable."""
    blocks = -(-len(boxes) // block)
    padding = blocks * block - len(boxes)
    boxes = jnp.pad(boxes, ((0, padding), (0, 0))).reshape(blocks, block, 4)
    usable = jnp.pad(usable, (0, padding)).reshape(blocks, block)
    return lax.map(lambda part: _compare(part[0], part[1], targets, valid), (boxes, usable))


def _compare(
    boxes: Float[Array, "n 4"], usable: Bool[Array, " n"], targets: Float[Array, "g 4"], valid: Bool[Array, " g"]
):
    """One block. An overlap that does not count is -1, below all that do."""
    iou = jnp.where(usable[:, None] & valid, pairwise_iou(boxes, targets), -1.0)
    # Overlaps are read three times, and must be the same numbers each time, not computed anew in each loop.
    iou = lax.optimization_barrier(iou)
    most, best_iou = jnp.max(iou, axis=1), jnp.max(iou, axis=0)
    target = jnp.where(most >= 0, first_index(iou == most[:, None], axis=1), 0)
    return _Blocks(most, target, _pack((iou == best_iou) & (iou > 0)), best_iou)


def _best_of(found: _Blocks, smallest: float) -> Int[Array, "blocks size"]:
    """The last target of which a box is the best (or one of several as good), -1 where there is none."""
    best = jnp.max(found.best_iou, axis=0)
    winner = (found.best_iou == best) & (best > 0) & (best >= smallest)
    bits = found.bests & _pack(winner)[:, None]
    words = jnp.arange(bits.shape[-1]) * BITS
    highest = words + BITS - 1 - lax.clz(bits).astype(jnp.int32)
    return jnp.max(jnp.where(bits > 0, highest, -1), axis=-1)


def _pack(flags: Bool[Array, "*batch g"]) -> UInt32[Array, "*batch words"]:
    """32 flags in a number, the first in the lowest bit."""
    words = -(-flags.shape[-1] // BITS)
    flags = jnp.pad(flags, [(0, 0)] * (flags.ndim - 1) + [(0, words * BITS - flags.shape[-1])])
    flags = flags.reshape(*flags.shape[:-1], words, BITS).astype(jnp.uint32)
    return jnp.sum(flags << jnp.arange(BITS, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
