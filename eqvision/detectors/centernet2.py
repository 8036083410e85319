"""CenterNet2 (Zhou et al. 2021, "Probabilistic two-stage detection"), as Scenic trains it.

A class-agnostic CenterNet proposes boxes from a pyramid of strides 8 to 128, and a cascade of box heads says what is
in them. The score of an object is the root of the proposal's probability times that of the class.

It is used as an ``RCNN``: ``model(...)`` finds objects, and ``train_outputs`` gives what ``losses.rcnn_loss`` needs,
with ``losses.CENTERNET2_LOSS``.
"""

import dataclasses

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key, PRNGKeyArray

from eqvision.backbones import resnet
from eqvision.backbones.resnet import Norm
from eqvision.backbones.vitdet import vitdet
from eqvision.classifiers import Backbone
from eqvision.detectors.centernet2_cells import CENTER_RULE, CenterRule, center_proposals, center_sample, level_cells
from eqvision.detectors.rcnn import Pyramid, no_training, pyramid_features
from eqvision.detectors.rcnn_dialects import DETECTRON2, ProposalRule, RCNNDialect, SampleRule
from eqvision.detectors.rcnn_stages import RoIStages, Stage, cascade_stages, check_stages
from eqvision.detectors.rcnn_targets import objects_on_image
from eqvision.heads.centernet2 import CenterProposalHead
from eqvision.heads.roi_box import RoIBoxHead
from eqvision.heads.roi_mask import RoIMaskHead
from eqvision.necks import FPN, SimplePyramid
from eqvision.ops.iou_assignment import IouRule
from eqvision.types import Detections, DetectionTargets, Features, PaddedImages, RCNNSamples, TokenFeatures

OVERLAPS = (0.6, 0.7, 0.8)
# Scenic's numbers; ``per_level`` of the proposals is of all levels together.
CENTERNET2: RCNNDialect = dataclasses.replace(
    DETECTRON2,
    train_proposals=ProposalRule(2000, 1000, overlap=0.9),
    test_proposals=ProposalRule(1000, 256, overlap=0.9),
    box_sample=SampleRule(512, 0.25, IouRule(OVERLAPS[0], OVERLAPS[0])),
    sampling_ratio=2,
    overlap=0.7,
)


class CenterNet2(eqx.Module):
    """``head`` reads all maps of the neck, and so do the box heads. A cascade's heads predict one box for all classes.

    ``mask_head`` adds masks, which the paper's models do not have. Of ``dialect``, what concerns anchors is not used.
    """

    backbone: Backbone
    neck: Pyramid
    head: CenterProposalHead
    box_heads: tuple[RoIBoxHead, ...]
    mask_head: RoIMaskHead | None
    dialect: RCNNDialect = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)
    stages: tuple[Stage, ...] = eqx.field(static=True)
    rule: CenterRule = eqx.field(static=True)
    count: int = eqx.field(static=True)

    def __init__(
        self,
        backbone: Backbone,
        neck: Pyramid,
        head: CenterProposalHead,
        box_heads: tuple[RoIBoxHead, ...],
        mask_head: RoIMaskHead | None = None,
        *,
        num_classes: int,
        dialect: RCNNDialect = CENTERNET2,
        stages: tuple[Stage, ...] = cascade_stages(OVERLAPS),
        rule: CenterRule = CENTER_RULE,
        count: int = 100,
    ):
        """``num_classes`` without the background. Raises ValueError where the parts do not fit together."""
        _check(neck, head, rule)
        check_stages("CenterNet2", box_heads, stages)
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.box_heads = box_heads
        self.mask_head = mask_head
        self.dialect = dialect
        self.num_classes = num_classes
        self.stages = stages
        self.rule = rule
        self.count = count

    def __call__(
        self, inputs: PaddedImages, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Detections, eqx.nn.State]:
        """As ``RCNN``. Raises ValueError for ``train=True``."""
        if train:
            raise no_training("a CenterNet2")
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
        """As ``RCNN.train_outputs``; the first stage is trained on all cells of the image."""
        features, state = self.features(inputs, state, train=train, key=key)
        return self.samples(features, inputs, targets, state, keys=keys, train=train)

    def features(
        self, inputs: PaddedImages, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        """The maps of the neck."""
        return pyramid_features(self.backbone, self.neck, inputs, state, train=train, key=key)

    def detect(self, features: Features, inputs: PaddedImages, state: eqx.nn.State) -> Detections:
        """From the neck's maps; ``inputs`` tell the sizes."""
        cells, on_image = level_cells(features, inputs.size, strides=self.neck.strides, rule=self.rule)
        rule = self.dialect.test_proposals
        proposals = center_proposals(self.head(features), cells, on_image, inputs.size, rule=rule)
        stages = self.roi_stages()
        return stages.detect(features, proposals, inputs.size, state, count=self.count, multiply=True)

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
        outputs = self.head(features)
        cells, on_image = level_cells(features, inputs.size, strides=self.neck.strides, rule=self.rule)
        targets = objects_on_image(targets, inputs.size)
        sample = center_sample(outputs, cells, on_image, targets, rule=self.rule)
        rule = self.dialect.train_proposals
        proposals = center_proposals(outputs, cells, on_image, inputs.size, rule=rule)
        (boxes, masks), state = self.roi_stages().samples(
            features, proposals, targets, inputs.size, state, keys=keys, train=train
        )
        return RCNNSamples(sample, boxes, masks), state

    def roi_stages(self) -> RoIStages:
        """What reads the maps under proposals."""
        return RoIStages(self.box_heads, self.mask_head, self.dialect, self.num_classes, self.stages, self.neck.strides)

    def intermediates(
        self, inputs: PaddedImages, state: eqx.nn.State, layers: tuple[int, ...]
    ) -> tuple[Float[Array, "..."] | TokenFeatures, ...]:
        """Features of the backbone's ``layers``."""
        return self.backbone.intermediates(inputs.images, state, layers)


def _check(neck: Pyramid, head: CenterProposalHead, rule: CenterRule) -> None:
    levels = len(neck.strides), len(head.scales), len(rule.ranges)
    if len(set(levels)) > 1:
        raise ValueError(
            f"CenterNet2: the neck gives {levels[0]} maps, the head is for {levels[1]} and the rule has {levels[2]} "
            "ranges of sizes; all three must be alike"
        )


def build_centernet2(
    backbone: Backbone,
    neck: Pyramid,
    *,
    num_classes: int = 80,
    masks: bool = False,
    head_width: int = 1024,
    num_groups: int = 32,
    overlaps: tuple[float, ...] = OVERLAPS,
    dialect: RCNNDialect = CENTERNET2,
    rule: CenterRule = CENTER_RULE,
    count: int = 100,
    key: PRNGKeyArray,
) -> CenterNet2:
    """Heads for any backbone and neck. ``overlaps`` make boxes those of objects, one for each of up to three heads."""
    keys, width = jax.random.split(key, 3), neck.channels[0]
    stages = cascade_stages(overlaps)
    first = dataclasses.replace(dialect.box_sample, match=IouRule(overlaps[0], overlaps[0]))
    options = {"num_outputs": num_classes + 1, "num_boxes": 1, "width": head_width, "init": "detectron2"}
    return CenterNet2(
        backbone,
        neck,
        CenterProposalHead(width, levels=len(neck.strides), num_groups=num_groups, key=keys[0]),
        tuple(RoIBoxHead(width, **options, key=k) for k in jax.random.split(keys[1], len(stages))),
        RoIMaskHead(width, num_outputs=num_classes, width=width, init="detectron2", key=keys[2]) if masks else None,
        num_classes=num_classes,
        dialect=dataclasses.replace(dialect, box_sample=first),
        stages=stages,
        rule=rule,
        count=count,
    )


def centernet2_resnet(
    depth: int = 50,
    *,
    num_classes: int = 80,
    in_channels: int = 3,
    norm: Norm = "frozen",
    backbone_width: int = 64,
    width: int = 256,
    head_width: int = 1024,
    num_groups: int = 32,
    masks: bool = False,
    overlaps: tuple[float, ...] = OVERLAPS,
    count: int = 100,
    key: PRNGKeyArray,
) -> CenterNet2:
    """On a ResNet and a pyramid of its last three maps and two more (42.9 box AP with 50 layers, by the authors).

    Images of any size.
    """
    keys = jax.random.split(key, 3)
    backbone = resnet(depth, in_channels=in_channels, zero_scale=False, norm=norm, width=backbone_width, key=keys[0])
    neck = FPN(backbone.channels, backbone.strides, width, extra="p6p7_on_output", first_level=1, key=keys[1])
    return build_centernet2(
        backbone,
        neck,
        num_classes=num_classes,
        masks=masks,
        head_width=head_width,
        num_groups=num_groups,
        overlaps=overlaps,
        count=count,
        key=keys[2],
    )


def centernet2_r50_fpn(
    *, num_classes: int = 80, in_channels: int = 3, norm: Norm = "frozen", key: PRNGKeyArray
) -> CenterNet2:
    """``centernet2_resnet`` of 50 layers."""
    return centernet2_resnet(50, num_classes=num_classes, in_channels=in_channels, norm=norm, key=key)


def centernet2_vitdet_b(
    *, num_classes: int = 80, image_size: int | tuple[int, int] = 1024, in_channels: int = 3, key: PRNGKeyArray
) -> CenterNet2:
    """Scenic's ``centernet2_ViTDetB``. Heights and widths of images are multiples of 16."""
    keys = jax.random.split(key, 3)
    backbone = vitdet("b", image_size=image_size, in_channels=in_channels, key=keys[0])
    neck = SimplePyramid(backbone.channels, backbone.strides, out_strides=(8, 16, 32), p6p7=True, key=keys[1])
    return build_centernet2(backbone, neck, num_classes=num_classes, key=keys[2])
