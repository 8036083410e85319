"""Anchors of an image, and the best boxes that a region proposal network makes of them. All in float32, no gradient."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from eqvision.detectors.rcnn_dialects import ProposalRule, RCNNDialect
from eqvision.heads.rpn import RPNOutputs
from eqvision.ops.anchors import anchors_on_image, pyramid_anchors, strides_of
from eqvision.ops.box_coder import decode_and_clip
from eqvision.ops.nms import nms, select_best, usable_rows
from eqvision.types import Features, Proposals

Sizes = tuple[tuple[float, ...], ...]
RATIOS = (0.5, 1.0, 2.0)
LevelAnchors = Sequence[Float[np.ndarray, "_ 4"]]
LevelFlags = Sequence[Bool[Array, "b _"]]


def rcnn_anchors(
    features: Features,
    image_size: tuple[int, int],
    size: Int[Array, "b 2"],
    *,
    strides: tuple[int, ...],
    sizes: Sizes,
    dialect: RCNNDialect,
) -> tuple[LevelAnchors, LevelFlags]:
    """Anchors of every level, three for each of ``sizes``, and which of them each image has.

    ``image_size`` is that of the padded batch, ``size`` that of each image. Anchors of places in the padding do not
    count, neither for proposals nor in training, so that how far a batch is padded changes little; torchvision and
    detectron2 count them, but pad to a multiple of 32 only.
    """
    grids = [(level.shape[1], level.shape[2]) for level in features]
    steps = strides_of(grids, image_size) if dialect.measured_strides else tuple((s, s) for s in strides)
    anchors = pyramid_anchors(grids, steps, sizes=sizes, aspect_ratios=RATIOS, dialect=dialect.name)
    return anchors, anchors_on_image(grids, steps, len(anchors[0]) // (grids[0][0] * grids[0][1]), size)


def select_proposals(
    outputs: RPNOutputs,
    anchors: LevelAnchors,
    on_image: LevelFlags,
    size: Int[Array, "b 2"],
    *,
    rule: ProposalRule,
    clamp_shrinking: bool = False,
) -> Proposals:
    """``rule.kept`` boxes, best first: those of a level suppress each other, and boxes of padding are not ``valid``.

    Of each level the ``rule.per_level`` best anchors are decoded, cut off at ``size``, and dropped where they are not
    finite or too small. Equal logits go to the earlier level, then to the earlier anchor.
    """
    arrays = lax.stop_gradient((outputs.logits, outputs.deltas))
    most = max(min(rule.per_level, level.shape[1]) for level in outputs.logits)
    levels = [
        _level_best(logits, deltas, jnp.asarray(level), inside, size, rule, clamp_shrinking, most)
        for logits, deltas, level, inside in zip(*arrays, anchors, on_image, strict=True)
    ]
    boxes, logits, valid = (jnp.stack(each, axis=1) for each in zip(*levels, strict=True))
    scores = jax.nn.sigmoid(logits) if rule.by_probability else logits
    kept = nms(boxes, scores, threshold=rule.overlap, valid=valid, max_kept=rule.kept)
    boxes, logits, scores, kept = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (boxes, logits, scores, kept))
    chosen = select_best(kept, scores, rule.kept)
    boxes, logits = (take_rows(x, chosen.indices) for x in (boxes, logits))
    return Proposals(jnp.where(chosen.valid[..., None], boxes, 0.0), jnp.where(chosen.valid, logits, 0.0), chosen.valid)


def boxes_at_least(boxes: Float[Array, "*n 4"], smallest: float, *, strict: bool) -> Bool[Array, "*n"]:
    """Whether width and height are at least ``smallest``, or above it."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return jnp.all(sides > smallest if strict else sides >= smallest, axis=-1)


def take_rows(x: Shaped[Array, "b n ..."], rows: Int[Array, "b k"]) -> Shaped[Array, "b k ..."]:
    """Of each image its ``rows``."""
    return jnp.take_along_axis(x, rows.reshape(*rows.shape, *(1,) * (x.ndim - 2)), axis=1)


def _level_best(
    logits: Float[Array, "b n"],
    deltas: Float[Array, "b n 4"],
    anchors: Float[Array, "n 4"],
    inside: Bool[Array, "b n"],
    size: Int[Array, "b 2"],
    rule: ProposalRule,
    clamp_shrinking: bool,
    most: int,
) -> tuple[Float[Array, "b most 4"], Float[Array, "b most"], Bool[Array, "b most"]]:
    """Boxes, logits and which count, in ``most`` rows; those behind the level's own are empty."""
    usable, deltas, ranks = usable_rows(deltas, logits, inside)
    best = select_best(usable, ranks, min(rule.per_level, logits.shape[1]))
    boxes = decode_and_clip(
        take_rows(deltas, best.indices), anchors[best.indices], size, clamp_shrinking=clamp_shrinking
    )
    logits = jnp.where(best.valid, take_rows(logits, best.indices), 0.0)
    valid = best.valid & boxes_at_least(boxes, rule.smallest, strict=rule.strict)
    missing = most - logits.shape[1]
    padding = ((0, 0), (0, missing))
    return jnp.pad(boxes, (*padding, (0, 0))), jnp.pad(logits, padding), jnp.pad(valid, padding)
