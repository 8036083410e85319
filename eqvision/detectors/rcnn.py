"""Faster R-CNN (Ren et al. 2015), Mask R-CNN (He et al. 2017) and Cascade R-CNN (Cai and Vasconcelos 2018).

Backbone, pyramid, region proposals, and heads that read the pyramid under each proposal. What is trained depends on
the objects: they say which anchors and boxes are drawn. So there are two ways through the model. ``__call__`` finds
objects. ``train_outputs`` takes the targets too and gives predictions beside what they should be, which is all that
``losses.rcnn_loss`` needs.
"""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from eqvision.classifiers import Backbone, Neck
from eqvision.detectors.rcnn_decode import decode_rcnn
from eqvision.detectors.rcnn_dialects import RCNNDialect
from eqvision.detectors.rcnn_proposals import (
    LevelAnchors,
    LevelFlags,
    Sizes,
    boxes_at_least,
    rcnn_anchors,
    select_proposals,
    take_rows,
)
from eqvision.detectors.rcnn_targets import (
    DrawnBoxes,
    box_targets,
    boxes_with_masks,
    draw_anchors,
    draw_boxes,
    mask_targets,
    match_boxes,
)
from eqvision.heads.roi_box import RoIBoxHead
from eqvision.heads.roi_mask import RoIMaskHead
from eqvision.heads.rpn import RPNHead, RPNOutputs
from eqvision.layers import fold
from eqvision.ops.box_coder import ROI_WEIGHTS, Weights, decode_boxes
from eqvision.ops.boxes import clip_boxes
from eqvision.ops.iou_assignment import IouRule
from eqvision.ops.roi_align import fpn_levels, roi_align
from eqvision.types import (
    AnchorSample,
    BoxSample,
    Detections,
    DetectionTargets,
    Features,
    MaskSample,
    PaddedImages,
    Proposals,
    RCNNSamples,
    TokenFeatures,
)

ANCHOR_SIZES: Sizes = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
BOX_BINS, MASK_BINS = 7, 14


class Stage(NamedTuple):
    """One box head of several: differences are multiplied by ``weights``; ``overlap`` makes a box that of an object.

    The first stage's overlap is that of the dialect.
    """

    weights: Weights = ROI_WEIGHTS
    overlap: float = 0.5


@runtime_checkable
class Pyramid(Neck, Protocol):
    """A neck as R-CNNs read it, such as ``necks.FPN``: maps of equal channels, fine to coarse."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]


class RCNN(eqx.Module):
    """Faster R-CNN; with ``mask_head`` Mask R-CNN, with several box heads a cascade.

    Proposals are read from all maps of the neck, boxes from those before the last ``extra`` (P6 has proposals only).
    A cascade's heads predict one box for all classes; each stage starts from the boxes of the one before, and scores
    are the mean of all stages.
    """

    backbone: Backbone
    neck: Pyramid
    rpn: RPNHead
    box_heads: tuple[RoIBoxHead, ...]
    mask_head: RoIMaskHead | None
    dialect: RCNNDialect = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)
    stages: tuple[Stage, ...] = eqx.field(static=True)
    anchor_sizes: Sizes = eqx.field(static=True)
    box_levels: int = eqx.field(static=True)
    count: int = eqx.field(static=True)

    def __init__(
        self,
        backbone: Backbone,
        neck: Pyramid,
        rpn: RPNHead,
        box_heads: tuple[RoIBoxHead, ...],
        mask_head: RoIMaskHead | None = None,
        *,
        dialect: RCNNDialect,
        num_classes: int,
        stages: tuple[Stage, ...] = (Stage(),),
        anchor_sizes: Sizes = ANCHOR_SIZES,
        extra: int = 1,
        count: int = 100,
    ):
        """``num_classes`` without the background. Raises ValueError where the parts do not fit together."""
        _check(neck, rpn, box_heads, stages, anchor_sizes)
        self.backbone = backbone
        self.neck = neck
        self.rpn = rpn
        self.box_heads = box_heads
        self.mask_head = mask_head
        self.dialect = dialect
        self.num_classes = num_classes
        self.stages = stages
        self.anchor_sizes = anchor_sizes
        self.box_levels = len(neck.strides) - extra
        self.count = count

    def __call__(
        self, inputs: PaddedImages, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Detections, eqx.nn.State]:
        """``count`` objects of each image, in pixels of the batch's images (``scale_detections`` moves them); masks
        are probabilities in the boxes, 28x28. Images of any size that backbone and neck take.

        Raises ValueError for ``train=True``: what is trained needs targets, see ``train_outputs``.
        """
        if train:
            raise ValueError(
                "an R-CNN is trained on boxes drawn by the targets; call train_outputs(inputs, targets, "
                "state, keys=...) and losses.rcnn_loss in place of model(..., train=True)"
            )
        features, state = self.features(inputs, state, key=key)
        return self.detect(features, inputs, state), state

    def train_outputs(
        self,
        inputs: PaddedImages,
        targets: DetectionTargets,
        state: eqx.nn.State,
        *,
        keys: Key[Array, " b"],
        train: bool = True,
        key: PRNGKeyArray | None = None,
    ) -> tuple[RCNNSamples, eqx.nn.State]:
        """Predictions for anchors and boxes drawn at random, and what they should be.

        ``keys`` are one for each image, and decide what is drawn from it: made from the step and the image's index,
        one device and eight draw the same. ``key`` is for backbones with dropout. ``train=False`` draws alike, with
        the norms as in use, to measure the loss. Raises ValueError for targets without masks where masks are trained.
        """
        features, state = self.features(inputs, state, train=train, key=key)
        return self.samples(features, inputs, targets, state, keys=keys, train=train)

    def features(
        self, inputs: PaddedImages, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        """The maps of the neck."""
        maps, state = self.backbone(inputs.images, state, train=train, key=fold(key, 0))
        maps = (maps.patches,) if isinstance(maps, TokenFeatures) else maps
        return self.neck(maps, state, train=train, key=fold(key, 1))

    def detect(self, features: Features, inputs: PaddedImages, state: eqx.nn.State) -> Detections:
        """From the neck's maps; ``inputs`` tell the sizes."""
        outputs, _ = self.rpn(features, state)
        anchors, on_image = self.anchors(features, inputs)
        proposals = self._proposals(outputs, anchors, on_image, inputs, train=False)
        scores, boxes = self._stages(features, proposals, inputs.size, state)
        found = decode_rcnn(scores, boxes, proposals.valid, inputs.size, dialect=self.dialect, count=self.count)
        if self.mask_head is None:
            return found
        maps, _ = self.mask_head(self._pooled(features, found.boxes, MASK_BINS), state)
        columns = found.labels + (1 if self.dialect.background == "first" else 0)
        masks = jax.nn.sigmoid(_column(maps, columns.reshape(-1)))
        return found._replace(masks=masks.reshape(*columns.shape, *masks.shape[1:]))

    def samples(
        self,
        features: Features,
        inputs: PaddedImages,
        targets: DetectionTargets,
        state: eqx.nn.State,
        *,
        keys: Key[Array, " b"],
        train: bool = True,
    ) -> tuple[RCNNSamples, eqx.nn.State]:
        """``train_outputs`` from the neck's maps."""
        outputs, state = self.rpn(features, state, train=train)
        anchors, on_image = self.anchors(features, inputs)
        first, second = (jax.vmap(jax.random.fold_in, (0, None))(keys, number) for number in range(2))
        anchor_sample = self._anchor_sample(outputs, anchors, on_image, targets, first)
        proposals = self._proposals(outputs, anchors, on_image, inputs, train=True)
        drawn = draw_boxes(proposals, targets, rule=self.dialect.box_sample, keys=second)
        boxes, state = self._box_samples(features, drawn, inputs, targets, state, train)
        masks, state = self._mask_sample(features, drawn, targets, state, train)
        return RCNNSamples(anchor_sample, boxes, masks), state

    def anchors(self, features: Features, inputs: PaddedImages) -> tuple[LevelAnchors, LevelFlags]:
        """See ``rcnn_anchors``."""
        return rcnn_anchors(
            features,
            (inputs.images.shape[1], inputs.images.shape[2]),
            inputs.size,
            strides=self.neck.strides,
            sizes=self.anchor_sizes,
            dialect=self.dialect,
        )

    def intermediates(
        self, inputs: PaddedImages, state: eqx.nn.State, layers: tuple[int, ...]
    ) -> tuple[Float[Array, "..."] | TokenFeatures, ...]:
        """Features of the backbone's ``layers``."""
        return self.backbone.intermediates(inputs.images, state, layers)

    def _proposals(
        self, outputs: RPNOutputs, anchors: LevelAnchors, on_image: LevelFlags, inputs: PaddedImages, *, train: bool
    ) -> Proposals:
        rule = self.dialect.train_proposals if train else self.dialect.test_proposals
        shrinking = self.dialect.clamp_shrinking
        return select_proposals(outputs, anchors, on_image, inputs.size, rule=rule, clamp_shrinking=shrinking)

    def _pooled(self, features: Features, boxes: Float[Array, "b r 4"], bins: int) -> Float[Array, "n p p c"]:
        """Maps under boxes, of all images in one row."""
        strides = self.neck.strides[: self.box_levels]
        levels = fpn_levels(
            boxes,
            num_levels=len(strides),
            finest=round(math.log2(strides[0])),
            rule=self.dialect.level_rule,
        )
        pooled = roi_align(
            features[: self.box_levels],
            boxes,
            levels,
            strides=strides,
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

    def _stages(
        self, features: Features, proposals: Proposals, size: Int[Array, "b 2"], state: eqx.nn.State
    ) -> tuple[Float[Array, "b r classes"], Float[Array, "b r boxes 4"]]:
        """Probabilities, the mean of all stages, and the last stage's boxes, both without the background."""
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

    def _anchor_sample(
        self,
        outputs: RPNOutputs,
        anchors: LevelAnchors,
        on_image: LevelFlags,
        targets: DetectionTargets,
        keys: Key[Array, " b"],
    ) -> AnchorSample:
        flags = jnp.concatenate(on_image, axis=1)
        everywhere = jnp.asarray(np.concatenate(anchors))
        drawn = draw_anchors(everywhere, flags, targets, rule=self.dialect.anchor_sample, keys=keys)
        logits, deltas = (jnp.concatenate(x, axis=1) for x in outputs)
        logits, deltas = (take_rows(x, drawn.rows) for x in (logits, deltas))
        return AnchorSample(logits, deltas, drawn.deltas, drawn.positive, drawn.valid)

    def _box_samples(
        self,
        features: Features,
        drawn: DrawnBoxes,
        inputs: PaddedImages,
        targets: DetectionTargets,
        state: eqx.nn.State,
        train: bool,
    ) -> tuple[tuple[BoxSample, ...], eqx.nn.State]:
        samples, moved = [], None
        for number, stage in enumerate(self.stages):
            if moved is not None:
                drawn = self._rematched(moved, drawn.valid, inputs.size, targets, stage)
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


def _column(maps: Float[Array, "n h w k"], columns: Int[Array, " n"]) -> Float[Array, "n h w"]:
    return jnp.take_along_axis(maps, columns[:, None, None, None], axis=3)[..., 0]


def _scale_gradient(x: Float[Array, "..."], share: float) -> Float[Array, "..."]:
    return x if share == 1 else lax.stop_gradient(x) + share * (x - lax.stop_gradient(x))


def _check(
    neck: Pyramid, rpn: RPNHead, box_heads: tuple[RoIBoxHead, ...], stages: tuple[Stage, ...], sizes: Sizes
) -> None:
    per_place = rpn.logits.weight.shape[-1]
    wanted = [3 * len(level) for level in sizes]
    if len(sizes) != len(neck.strides) or wanted != [per_place] * len(sizes):
        raise ValueError(
            f"RCNN: the neck gives {len(neck.strides)} maps and the head of the proposals {per_place} anchors a place; "
            f"anchor_sizes {sizes} make {wanted} (three shapes of each size). Give a list of sizes for every map"
        )
    if not box_heads or len(box_heads) != len(stages):
        raise ValueError(f"RCNN: {len(box_heads)} box heads and {len(stages)} stages; expected one head for each stage")
    shared = [head.deltas.weight.shape[-1] == 4 for head in box_heads]
    if len(stages) > 1 and not all(shared):
        raise ValueError("RCNN: the heads of a cascade predict one box for all classes; build them with num_boxes=1")
