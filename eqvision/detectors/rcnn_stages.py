"""What an R-CNN does with its proposals, wherever they come from: heads read the pyramid under each of them."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from eqvision.detectors.rcnn_decode import decode_rcnn
from eqvision.detectors.rcnn_dialects import RCNNDialect
from eqvision.detectors.rcnn_proposals import boxes_at_least
from eqvision.detectors.rcnn_targets import (
    DrawnBoxes,
    box_targets,
    boxes_with_masks,
    draw_boxes,
    mask_targets,
    match_boxes,
)
from eqvision.heads.roi_box import RoIBoxHead
from eqvision.heads.roi_mask import RoIMaskHead
from eqvision.ops.box_coder import CASCADE_WEIGHTS, ROI_WEIGHTS, Weights, decode_boxes
from eqvision.ops.boxes import clip_boxes
from eqvision.ops.iou_assignment import IouRule
from eqvision.ops.roi_align import fpn_levels, roi_align
from eqvision.types import BoxSample, Detections, DetectionTargets, Features, MaskSample, Proposals

BOX_BINS, MASK_BINS = 7, 14


class Stage(NamedTuple):
    """One box head of several: differences are multiplied by ``weights``; ``overlap`` makes a box that of an object.

    The first stage's overlap is that of the dialect.
    """

    weights: Weights = ROI_WEIGHTS
    overlap: float = 0.5


def cascade_stages(overlaps: tuple[float, ...]) -> tuple[Stage, ...]:
    """Stages of Cai and Vasconcelos 2018, one for each overlap; at most three."""
    return tuple(Stage(*each) for each in zip(CASCADE_WEIGHTS[: len(overlaps)], overlaps, strict=True))


@dataclass(frozen=True)
class RoIStages:
    """Box heads one after the other, and a mask head or none; ``strides`` are those of the maps that they read."""

    box_heads: tuple[RoIBoxHead, ...]
    mask_head: RoIMaskHead | None
    dialect: RCNNDialect
    num_classes: int
    stages: tuple[Stage, ...]
    strides: tuple[int, ...]

    def detect(
        self,
        features: Features,
        proposals: Proposals,
        size: Int[Array, "b 2"],
        state: eqx.nn.State,
        *,
        count: int,
        multiply: bool = False,
    ) -> Detections:
        """Objects of each image. ``multiply``: scores are the root of the class's and the proposal's probability."""
        scores, boxes = self._probabilities(features, proposals, size, state)
        if multiply:
            scores = jnp.sqrt(scores * jax.nn.sigmoid(proposals.logits)[..., None])
        found = decode_rcnn(scores, boxes, proposals.valid, size, dialect=self.dialect, count=count)
        if self.mask_head is None:
            return found
        maps, _ = self.mask_head(self._pooled(features, found.boxes, MASK_BINS), state)
        columns = found.labels + (1 if self.dialect.background == "first" else 0)
        masks = jax.nn.sigmoid(_column(maps, columns.reshape(-1)))
        return found._replace(masks=masks.reshape(*columns.shape, *masks.shape[1:]))

    def samples(
        self,
        features: Features,
        proposals: Proposals,
        targets: DetectionTargets,
        size: Int[Array, "b 2"],
        state: eqx.nn.State,
        *,
        keys: Key[Array, " b"],
        train: bool,
    ) -> tuple[tuple[tuple[BoxSample, ...], MaskSample | None], eqx.nn.State]:
        """Predictions for boxes drawn at random, and what they should be. ``targets`` as from ``objects_on_image``."""
        drawn = draw_boxes(proposals, targets, rule=self.dialect.box_sample, keys=keys)
        boxes, state = self._box_samples(features, drawn, targets, size, state, train)
        masks, state = self._mask_sample(features, drawn, targets, state, train)
        return (boxes, masks), state

    def _pooled(self, features: Features, boxes: Float[Array, "b r 4"], bins: int) -> Float[Array, "n p p c"]:
        """Maps under boxes, of all images in one row."""
        levels = fpn_levels(
            boxes,
            num_levels=len(self.strides),
            finest=round(math.log2(self.strides[0])),
            rule=self.dialect.level_rule,
        )
        pooled = roi_align(
            features[: len(self.strides)],
            boxes,
            levels,
            strides=self.strides,
            bins=bins,
            sampling_ratio=self.dialect.sampling_ratio,
            aligned=self.dialect.aligned,
        ).values
        return pooled.reshape(-1, *pooled.shape[2:])

    def _read(
        self, stage: int, features: Features, boxes: Float[Array, "b r 4"], state: eqx.nn.State, train: bool
    ) -> tuple[tuple[Float[Array, "b r k"], Float[Array, "b r boxes 4"]], eqx.nn.State]:
        """Logits and differences of a stage."""
        # As in detectron2 each head of a cascade sends its share of the gradient to the features.
        pooled = _scale_gradient(self._pooled(features, boxes, BOX_BINS), 1 / len(self.stages))
        (logits, deltas), state = self.box_heads[stage](pooled, state, train=train)
        logits, deltas = (x.reshape(*boxes.shape[:2], *x.shape[1:]) for x in (logits, deltas))
        return (logits, deltas), state

    def _moved(
        self, stage: int, deltas: Float[Array, "b r boxes 4"], boxes: Float[Array, "b r 4"]
    ) -> Float[Array, "b r boxes 4"]:
        weights, shrinking = self.stages[stage].weights, self.dialect.clamp_shrinking
        return decode_boxes(deltas, boxes[:, :, None], weights=weights, clamp_shrinking=shrinking)

    def _probabilities(
        self, features: Features, proposals: Proposals, size: Int[Array, "b 2"], state: eqx.nn.State
    ) -> tuple[Float[Array, "b r classes"], Float[Array, "b r boxes 4"]]:
        """The mean of all stages, and the last stage's boxes, both without the background."""
        boxes, scores, moved = proposals.boxes, [], None
        for stage in range(len(self.stages)):
            boxes = boxes if moved is None else clip_boxes(moved[:, :, 0], size)
            (logits, deltas), _ = self._read(stage, features, boxes, state, False)
            scores.append(jax.nn.softmax(logits, axis=-1))
            moved = self._moved(stage, deltas, boxes)
        assert moved is not None
        start = 1 if self.dialect.background == "first" else 0
        own = slice(start, start + self.num_classes)
        return sum(scores[1:], scores[0])[..., own] / len(scores), moved if moved.shape[2] == 1 else moved[:, :, own]

    def _box_samples(
        self,
        features: Features,
        drawn: DrawnBoxes,
        targets: DetectionTargets,
        size: Int[Array, "b 2"],
        state: eqx.nn.State,
        train: bool,
    ) -> tuple[tuple[BoxSample, ...], eqx.nn.State]:
        samples, moved = [], None
        for number, stage in enumerate(self.stages):
            if moved is not None:
                drawn = self._rematched(moved, drawn.valid, size, targets, stage)
            (logits, deltas), state = self._read(number, features, drawn.boxes, state, train)
            options = {"num_classes": self.num_classes, "weights": stage.weights}
            columns, goals = box_targets(drawn, targets, dialect=self.dialect, **options)
            own = jnp.clip(columns, 0, deltas.shape[2] - 1)[..., None, None]
            chosen = jnp.take_along_axis(deltas, own, axis=2)[:, :, 0]
            samples.append(BoxSample(logits, chosen, columns, goals, drawn.positive, drawn.valid))
            moved = self._moved(number, deltas, drawn.boxes)
        return tuple(samples), state

    def _rematched(
        self,
        moved: Float[Array, "b r 1 4"],
        valid: Bool[Array, "b r"],
        size: Int[Array, "b 2"],
        targets: DetectionTargets,
        stage: Stage,
    ) -> DrawnBoxes:
        boxes = lax.stop_gradient(clip_boxes(moved[:, :, 0], size))
        valid = valid & boxes_at_least(boxes, 0.0, strict=True)
        return match_boxes(boxes, valid, targets, rule=IouRule(stage.overlap, stage.overlap))

    def _mask_sample(
        self, features: Features, drawn: DrawnBoxes, targets: DetectionTargets, state: eqx.nn.State, train: bool
    ) -> tuple[MaskSample | None, eqx.nn.State]:
        if self.mask_head is None:
            return None, state
        rule = self.dialect.box_sample
        drawn = boxes_with_masks(drawn, int(rule.count * rule.positive))
        maps, state = self.mask_head(self._pooled(features, drawn.boxes, MASK_BINS), state, train=train)
        options = {"num_classes": self.num_classes, "weights": ROI_WEIGHTS}
        columns, _ = box_targets(drawn, targets, dialect=self.dialect, **options)
        logits = _column(maps, jnp.clip(columns, 0, maps.shape[-1] - 1).reshape(-1))
        logits = logits.reshape(*columns.shape, *logits.shape[1:])
        goals = mask_targets(drawn, targets, dialect=self.dialect, size=logits.shape[-1])
        return MaskSample(logits, goals, drawn.valid), state


def check_stages(model: str, box_heads: tuple[RoIBoxHead, ...], stages: tuple[Stage, ...]) -> None:
    """Raises ValueError where heads and stages do not fit together."""
    if not box_heads or len(box_heads) != len(stages):
        raise ValueError(
            f"{model}: {len(box_heads)} box heads and {len(stages)} stages; expected one head for each stage"
        )
    shared = [head.deltas.weight.shape[-1] == 4 for head in box_heads]
    if len(stages) > 1 and not all(shared):
        raise ValueError(
            f"{model}: the heads of a cascade predict one box for all classes; build them with num_boxes=1"
        )


def _column(maps: Float[Array, "n h w k"], columns: Int[Array, " n"]) -> Float[Array, "n h w"]:
    return jnp.take_along_axis(maps, columns[:, None, None, None], axis=3)[..., 0]


def _scale_gradient(x: Float[Array, "..."], share: float) -> Float[Array, "..."]:
    return x if share == 1 else lax.stop_gradient(x) + share * (x - lax.stop_gradient(x))
