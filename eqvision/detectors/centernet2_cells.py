"""Cells of a pyramid as CenterNet2 reads and trains them (Zhou et al. 2021): which objects they find, and where."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from eqvision.detectors.rcnn_dialects import ProposalRule
from eqvision.detectors.rcnn_proposals import boxes_at_least, take_rows
from eqvision.heads.centernet2 import CenterOutputs
from eqvision.ops.anchors import anchors_on_image
from eqvision.ops.boxes import box_area, clip_boxes
from eqvision.ops.nms import nms, select_best, usable_rows
from eqvision.types import CenterSample, DetectionTargets, Features, Proposals

NEAREST = 1e-6  # squared distances below count as this, so that the heatmap is 1 in cells of centres alone


@dataclass(frozen=True)
class CenterRule:
    """Which objects the cells of a level find, and how its heatmap is drawn."""

    ranges: tuple[tuple[float, float], ...] = ((0.0, 80.0), (64.0, 160.0), (128.0, 320.0), (256.0, 640.0), (512.0, 1e5))
    """Least and largest half diagonal of each level's objects, in pixels; an object may belong to two levels."""
    min_overlap: float = 0.8
    """Overlap that a box keeps whose centre is off by the radius; it decides how wide the peaks are."""
    min_radius: float = 4.0
    """Least radius, in pixels."""


CENTER_RULE = CenterRule()


class Cells(NamedTuple):
    """Constants of all ``n`` cells, level after level, over y, then x."""

    places: Int[np.ndarray, "n 2"]
    """Column and row in the cell's level."""
    strides: Float[np.ndarray, " n"]
    least: Float[np.ndarray, " n"]
    most: Float[np.ndarray, " n"]

    @property
    def middles(self) -> Float[np.ndarray, "n 2"]:
        """In pixels (x, y); rounded down where the stride is odd."""
        return (self.places * self.strides[:, None] + self.strides[:, None] // 2).astype(np.float32)


def level_cells(
    features: Features, size: Int[Array, "b 2"], *, strides: tuple[int, ...], rule: CenterRule
) -> tuple[Cells, Bool[Array, "b n"]]:
    """Cells of all levels, and which of them begin inside each image of ``size`` (height, width)."""
    grids = [(level.shape[1], level.shape[2]) for level in features]
    places = [np.stack(np.meshgrid(np.arange(w), np.arange(h)), axis=-1).reshape(-1, 2) for h, w in grids]
    columns = (
        np.concatenate([np.full(len(each), value, np.float32) for each, value in zip(places, values, strict=True)])
        for values in (strides, *zip(*rule.ranges, strict=True))
    )
    on_image = anchors_on_image(grids, tuple((s, s) for s in strides), 1, size)
    return Cells(np.concatenate(places).astype(np.int32), *columns), jnp.concatenate(on_image, axis=1)


def center_sample(
    outputs: CenterOutputs, cells: Cells, on_image: Bool[Array, "b n"], targets: DetectionTargets, *, rule: CenterRule
) -> CenterSample:
    """Predictions of all cells, and what they should be. ``targets`` as from ``objects_on_image``.

    The heatmap is drawn on all levels, with its 1 on the levels of the object's size only. Distances are learned in
    the cell of the centre and the eight around, as far as they lie in the object; of several objects the nearest
    counts. As in Scenic; the authors' code gives the cell of a centre a little of the loss of a cell without one.
    """
    logits, distances = (jnp.concatenate(x, axis=1) for x in outputs)
    heatmap, goals, positive = jax.vmap(lambda boxes, valid: _wanted(cells, boxes, valid, rule))(
        targets.boxes, targets.valid
    )
    return CenterSample(logits, heatmap, distances, goals, positive, on_image)


def center_proposals(
    outputs: CenterOutputs, cells: Cells, on_image: Bool[Array, "b n"], size: Int[Array, "b 2"], *, rule: ProposalRule
) -> Proposals:
    """The ``rule.kept`` best boxes, best first, of the ``rule.per_level`` best cells of all levels together.

    Boxes of all levels suppress each other; then they are cut off at ``size``, and empty ones are not ``valid``.
    """
    logits, distances = (lax.stop_gradient(jnp.concatenate(x, axis=1)) for x in outputs)
    usable, distances, ranks = usable_rows(distances, logits, on_image)
    best = select_best(usable, ranks, rule.per_level)
    middles, strides = jnp.asarray(cells.middles)[best.indices], jnp.asarray(cells.strides)[best.indices]
    moves = take_rows(distances, best.indices) * strides[..., None]
    boxes = jnp.concatenate([middles - moves[..., :2], middles + moves[..., 2:]], axis=-1)
    logits = jnp.where(best.valid, take_rows(logits, best.indices), 0.0)
    kept = nms(boxes, logits, threshold=rule.overlap, valid=best.valid, max_kept=rule.kept)
    chosen = select_best(kept, logits, rule.kept)
    boxes, logits = clip_boxes(take_rows(boxes, chosen.indices), size), take_rows(logits, chosen.indices)
    valid = chosen.valid & boxes_at_least(boxes, rule.smallest, strict=rule.strict)
    return Proposals(jnp.where(valid[..., None], boxes, 0.0), jnp.where(valid, logits, 0.0), valid)


def _wanted(
    cells: Cells, boxes: Float[Array, "g 4"], valid: Bool[Array, " g"], rule: CenterRule
) -> tuple[Float[Array, " n"], Float[Array, "n 4"], Bool[Array, " n"]]:
    """Of one image: heatmap, distances in cells, and which cells have an object; pairs are (cell, object)."""
    boxes, valid = jnp.pad(boxes, ((0, 1), (0, 0))), jnp.pad(valid, (0, 1))  # a row to find where there is none
    middles, strides = jnp.asarray(cells.middles)[:, None], jnp.asarray(cells.strides)[:, None]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    steps = jnp.abs(cells.places[:, None] - jnp.floor(centres / strides[..., None]).astype(jnp.int32)).max(axis=-1)
    half = jnp.sqrt(jnp.sum(jnp.square(boxes[:, 2:] - boxes[:, :2]), axis=-1)) / 2
    own_level = (half >= cells.least[:, None]) & (half <= cells.most[:, None]) & valid
    delta = (1 - rule.min_overlap) / (1 + rule.min_overlap)
    radius = jnp.maximum(2 * delta**2 * box_area(boxes), rule.min_radius**2)
    away = jnp.maximum(jnp.sum(jnp.square(middles - centres), axis=-1) / radius, NEAREST)
    away = jnp.where((steps == 0) & own_level, 0.0, away)
    inside = ((middles > boxes[:, :2]) & (middles < boxes[:, 2:])).all(axis=-1)
    wanted = own_level & (steps <= 1) & inside
    nearest = boxes[jnp.argmin(jnp.where(wanted, away, jnp.inf), axis=1)]
    goals = jnp.concatenate([middles[:, 0] - nearest[:, :2], nearest[:, 2:] - middles[:, 0]], axis=-1) / strides
    positive = wanted.any(axis=1)
    heatmap = jnp.exp(-jnp.where(valid, away, jnp.inf).min(axis=1))
    return heatmap, jnp.where(positive[:, None], goals, 0.0), positive
