"""Faster R-CNN (Ren et al. 2015), Mask R-CNN (He et al. 2017) and Cascade R-CNN (Cai and Vasconcelos 2018).

Backbone, pyramid, region proposals, and heads that read the pyramid under each proposal. What is trained depends on
the objects: they say which anchors and boxes are drawn. So there are two ways through the model. ``__call__`` finds
objects. ``train_outputs`` takes the targets too and gives predictions beside what they should be, which is all that
``losses.rcnn_loss`` needs.
"""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray

from eqvision.classifiers import Backbone, Neck
from eqvision.detectors.rcnn_dialects import RCNNDialect
from eqvision.detectors.rcnn_proposals import (
    LevelAnchors,
    LevelFlags,
    Sizes,
    rcnn_anchors,
    select_proposals,
    take_rows,
)
from eqvision.detectors.rcnn_stages import RoIStages, Stage, check_stages
from eqvision.detectors.rcnn_targets import draw_anchors, objects_on_image
from eqvision.heads.roi_box import RoIBoxHead
from eqvision.heads.roi_mask import RoIMaskHead
from eqvision.heads.rpn import RPNHead, RPNOutputs
from eqvision.layers import fold
from eqvision.types import (
    AnchorSample,
    Detections,
    DetectionTargets,
    Features,
    PaddedImages,
    Proposals,
    RCNNSamples,
    TokenFeatures,
)

ANCHOR_SIZES: Sizes = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))


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
            raise no_training("an R-CNN")
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
        the norms as in use, to measure the loss.

        Objects are cut off at the image, and those of which nothing is left count for nothing. Raises ValueError for
        targets without masks where masks are trained.
        """
        features, state = self.features(inputs, state, train=train, key=key)
        return self.samples(features, inputs, targets, state, keys=keys, train=train)

    def features(
        self, inputs: PaddedImages, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        """The maps of the neck."""
        return pyramid_features(self.backbone, self.neck, inputs, state, train=train, key=key)

    def detect(self, features: Features, inputs: PaddedImages, state: eqx.nn.State) -> Detections:
        """From the neck's maps; ``inputs`` tell the sizes."""
        outputs, _ = self.rpn(features, state)
        anchors, on_image = self.anchors(features, inputs)
        proposals = self._proposals(outputs, anchors, on_image, inputs, train=False)
        return self.roi_stages().detect(features, proposals, inputs.size, state, count=self.count)

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
        targets = objects_on_image(targets, inputs.size)
        first, second = (jax.vmap(jax.random.fold_in, (0, None))(keys, number) for number in range(2))
        anchor_sample = self._anchor_sample(outputs, anchors, on_image, targets, first)
        proposals = self._proposals(outputs, anchors, on_image, inputs, train=True)
        (boxes, masks), state = self.roi_stages().samples(
            features, proposals, targets, inputs.size, state, keys=second, train=train
        )
        return RCNNSamples(anchor_sample, boxes, masks), state

    def roi_stages(self) -> RoIStages:
        """What reads the maps under proposals."""
        strides = self.neck.strides[: self.box_levels]
        return RoIStages(self.box_heads, self.mask_head, self.dialect, self.num_classes, self.stages, strides)

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


def pyramid_features(
    backbone: Backbone,
    neck: Pyramid,
    inputs: PaddedImages,
    state: eqx.nn.State,
    *,
    train: bool = False,
    key: PRNGKeyArray | None = None,
) -> tuple[Features, eqx.nn.State]:
    """Maps of the neck; of a transformer without maps its patch tokens are one."""
    maps, state = backbone(inputs.images, state, train=train, key=fold(key, 0))
    maps = (maps.patches,) if isinstance(maps, TokenFeatures) else maps
    return neck(maps, state, train=train, key=fold(key, 1))


def no_training(model: str) -> ValueError:
    """What is wrong with ``model(..., train=True)``."""
    return ValueError(
        f"{model} is trained on boxes drawn by the targets; call train_outputs(inputs, targets, "
        "state, keys=...) and losses.rcnn_loss in place of model(..., train=True)"
    )


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
    check_stages("RCNN", box_heads, stages)
