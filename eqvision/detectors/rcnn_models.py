"""R-CNNs on ResNets and feature pyramids, as torchvision, detectron2 and mmdet publish them."""

import dataclasses

import jax
from jaxtyping import PRNGKeyArray

from eqvision.backbones import resnet
from eqvision.backbones.resnet import Norm, ResidualBlock, ResNet
from eqvision.classifiers import Backbone
from eqvision.detectors.rcnn import ANCHOR_SIZES, RCNN, Pyramid
from eqvision.detectors.rcnn_dialects import RCNNDialect, rcnn_dialect
from eqvision.detectors.rcnn_proposals import Sizes
from eqvision.detectors.rcnn_stages import Stage, cascade_stages
from eqvision.heads.roi_box import Init, RoIBoxHead
from eqvision.heads.roi_mask import RoIMaskHead
from eqvision.heads.rpn import RPNHead
from eqvision.layers import FrozenBatchNorm, NormKind
from eqvision.necks.fpn import FPN
from eqvision.ops.iou_assignment import ROI_RULES

CASCADE = cascade_stages((0.5, 0.6, 0.7))


def build_rcnn(
    backbone: Backbone,
    neck: Pyramid,
    *,
    dialect: RCNNDialect,
    num_classes: int,
    masks: bool = False,
    cascade: bool = False,
    rpn_depth: int = 1,
    num_convs: int = 0,
    num_linears: int = 2,
    norm: NormKind = "none",
    head_width: int = 1024,
    anchor_sizes: Sizes = ANCHOR_SIZES,
    count: int = 100,
    key: PRNGKeyArray,
) -> RCNN:
    """Heads for any backbone and neck; ``norm`` is that of the convolutions in box and mask heads.

    ``cascade`` is three box heads of Cai and Vasconcelos 2018 with one box for all classes, as in detectron2.
    """
    keys = jax.random.split(key, 3)
    width, first = neck.channels[0], dialect.background == "first"
    stages = CASCADE if cascade else (Stage(),)
    init: Init = "torch" if dialect.name == "torchvision" else "detectron2"
    columns = num_classes + first
    box_heads = tuple(
        RoIBoxHead(
            width,
            num_outputs=num_classes + 1,
            num_boxes=1 if cascade else columns,
            num_convs=num_convs,
            num_linears=num_linears,
            width=head_width,
            norm=norm,
            init=init,
            key=k,
        )
        for k in jax.random.split(keys[0], len(stages))
    )
    mask_head = RoIMaskHead(width, num_outputs=columns, width=width, norm=norm, init=init, key=keys[2])
    return RCNN(
        backbone,
        neck,
        RPNHead(width, num_anchors=3 * len(anchor_sizes[0]), depth=rpn_depth, key=keys[1]),
        box_heads,
        mask_head if masks else None,
        dialect=dialect,
        num_classes=num_classes,
        stages=stages,
        anchor_sizes=anchor_sizes,
        count=count,
    )


def rcnn_resnet_fpn(
    depth: int = 50,
    *,
    num_classes: int = 90,
    in_channels: int = 3,
    dialect: str | RCNNDialect = "torchvision",
    masks: bool = False,
    cascade: bool = False,
    norm: Norm = "frozen",
    frozen_eps: float | None = None,
    v2: bool = False,
    backbone_width: int = 64,
    width: int = 256,
    head_width: int = 1024,
    anchor_sizes: Sizes = ANCHOR_SIZES,
    count: int = 100,
    key: PRNGKeyArray,
) -> RCNN:
    """An R-CNN on a ResNet of ``depth`` and a pyramid of ``width`` channels.

    ``num_classes`` is without the background: 90 are the ids of COCO, of which torchvision's models know all;
    detectron2's and mmdet's have the 80 in use. A ``dialect`` is a name or the numbers themselves. detectron2's ResNet
    has the stride in the first 1x1 convolution of a block (MSRA), and takes images that 32 divides.

    ``norm="frozen"`` fixes the backbone's batch norms, which makes sense with pretrained weights only. ``frozen_eps``
    is their eps: None is 0 for torchvision, whose published v1 weights were trained so, and 1e-5 else. (mmdet trains
    scale and shift of norms whose statistics are fixed; here both are fixed.) With ``v2`` all is as in torchvision's
    ``_v2``: a second convolution before the proposals, four before one linear layer in the box head, and batch norms
    in pyramid and heads. Raises UnknownNameError for another dialect.
    """
    rule = rcnn_dialect(dialect) if isinstance(dialect, str) else dialect
    if rule.name == "mmdet" and masks:
        rule = dataclasses.replace(
            rule, box_sample=dataclasses.replace(rule.box_sample, match=ROI_RULES["mmdet_mask_rcnn"])
        )
    keys = jax.random.split(key, 3)
    backbone = resnet(depth, in_channels=in_channels, zero_scale=False, norm=norm, width=backbone_width, key=keys[0])
    backbone = stride_first(backbone, norm=norm, key=keys[0]) if rule.name == "detectron2" else backbone
    eps = frozen_eps if frozen_eps is not None else (0.0 if rule.name == "torchvision" else 1e-5)
    neck_norm: NormKind = "batch" if v2 else "none"
    return build_rcnn(
        with_frozen_eps(backbone, eps),
        FPN(backbone.channels, backbone.strides, width, dialect=rule.name, norm=neck_norm, key=keys[1]),
        dialect=rule,
        num_classes=num_classes,
        masks=masks,
        cascade=cascade,
        rpn_depth=2 if v2 else 1,
        num_convs=4 if v2 else 0,
        num_linears=1 if v2 else 2,
        norm=neck_norm,
        head_width=head_width,
        anchor_sizes=anchor_sizes,
        count=count,
        key=keys[2],
    )


def faster_rcnn_r50_fpn(
    *, num_classes: int = 90, in_channels: int = 3, dialect: str = "torchvision", key: PRNGKeyArray
) -> RCNN:
    """torchvision's ``fasterrcnn_resnet50_fpn`` (37.0 box AP), or that of another dialect."""
    return rcnn_resnet_fpn(50, num_classes=num_classes, in_channels=in_channels, dialect=dialect, key=key)


def mask_rcnn_r50_fpn(
    *, num_classes: int = 90, in_channels: int = 3, dialect: str = "torchvision", key: PRNGKeyArray
) -> RCNN:
    """torchvision's ``maskrcnn_resnet50_fpn`` (37.9 box and 34.6 mask AP), or that of another dialect."""
    return rcnn_resnet_fpn(50, masks=True, num_classes=num_classes, in_channels=in_channels, dialect=dialect, key=key)


def faster_rcnn_r50_fpn_v2(*, num_classes: int = 90, in_channels: int = 3, key: PRNGKeyArray) -> RCNN:
    """torchvision's ``fasterrcnn_resnet50_fpn_v2`` (46.7 box AP)."""
    return rcnn_resnet_fpn(50, v2=True, norm="batch", num_classes=num_classes, in_channels=in_channels, key=key)


def mask_rcnn_r50_fpn_v2(*, num_classes: int = 90, in_channels: int = 3, key: PRNGKeyArray) -> RCNN:
    """torchvision's ``maskrcnn_resnet50_fpn_v2`` (47.4 box and 41.8 mask AP)."""
    return rcnn_resnet_fpn(
        50, masks=True, v2=True, norm="batch", num_classes=num_classes, in_channels=in_channels, key=key
    )


def cascade_mask_rcnn_r50_fpn(
    *, num_classes: int = 80, in_channels: int = 3, dialect: str = "detectron2", key: PRNGKeyArray
) -> RCNN:
    """detectron2's ``cascade_mask_rcnn_R_50_FPN``, or that of another dialect."""
    return rcnn_resnet_fpn(
        50, masks=True, cascade=True, num_classes=num_classes, in_channels=in_channels, dialect=dialect, key=key
    )


def stride_first(net: ResNet, *, norm: Norm, key: PRNGKeyArray) -> ResNet:
    """The ResNet of He et al. 2016 (MSRA): bottlenecks with stride have it in the first 1x1 convolution."""
    stages = [net.stages[0]]
    for stage, k in zip(net.stages[1:], jax.random.split(key, len(net.stages) - 1), strict=True):
        first = stage[0].convs[0].conv.weight.shape[2]
        widths = tuple(conv.conv.weight.shape[3] for conv in stage[0].convs)
        if len(widths) != 3:
            raise ValueError(
                "stride_first: the stride moves in bottlenecks only; choose a ResNet of depth 50 or more, "
                "or another dialect than detectron2"
            )
        block = ResidualBlock(
            first, widths, (1, 3, 1), (2, 1, 1), shortcut="projection", zero_scale=False, norm=norm, key=k
        )
        stages.append((block, *stage[1:]))
    return ResNet(net.stem, tuple(stages), pool_stem=net.pool_stem, in_channels=net.in_channels)


def with_frozen_eps(net: ResNet, eps: float) -> ResNet:
    """Fresh frozen norms with another eps, as torchvision's ``overwrite_eps``."""

    def renewed(node: object) -> object:
        return FrozenBatchNorm(node.weight.shape[0], eps=eps) if isinstance(node, FrozenBatchNorm) else node

    return jax.tree.map(renewed, net, is_leaf=lambda node: isinstance(node, FrozenBatchNorm))
