"""R-CNNs of our own making for small images and few of them, trained from scratch on a CPU."""

import dataclasses

import jax
from jaxtyping import PRNGKeyArray

from eqvision.backbones import resnet
from eqvision.backbones.resnet import Norm
from eqvision.detectors.rcnn import RCNN
from eqvision.detectors.rcnn_dialects import DETECTRON2, ProposalRule, RCNNDialect
from eqvision.heads.roi_box import RoIBoxHead
from eqvision.heads.roi_mask import RoIMaskHead
from eqvision.heads.rpn import RPNHead
from eqvision.necks.fpn import FPN

ANCHORS = ((12.0,), (24.0,), (48.0,), (96.0,), (192.0,))
# detectron2's rules with fewer of everything, and two samples a bin: boxes span few cells here.
SMALL_DIALECT: RCNNDialect = dataclasses.replace(
    DETECTRON2,
    train_proposals=ProposalRule(400, 200),
    test_proposals=ProposalRule(400, 200),
    anchor_sample=dataclasses.replace(DETECTRON2.anchor_sample, count=128),
    box_sample=dataclasses.replace(DETECTRON2.box_sample, count=64),
    sampling_ratio=2,
)


def mask_rcnn_small(
    *, num_classes: int = 80, in_channels: int = 3, masks: bool = True, norm: Norm = "batch", key: PRNGKeyArray
) -> RCNN:
    """Mask R-CNN on a ResNet-18 of half the width, a pyramid of 64 channels and anchors from 12 pixels.

    Batch norms in pyramid and mask head too, which training from scratch wants. Images of any size.
    """
    keys = jax.random.split(key, 5)
    backbone = resnet(18, in_channels=in_channels, norm=norm, width=32, key=keys[0])
    # The pyramid of torchvision takes maps that are not exactly twice as large as the next.
    neck = FPN(backbone.channels, backbone.strides, 64, dialect="torchvision", norm="batch", key=keys[1])
    box_head = RoIBoxHead(
        64, num_outputs=num_classes + 1, num_boxes=num_classes, num_convs=0, width=256, init="detectron2", key=keys[3]
    )
    # Half the depth and width of the others: at 28x28 for each object it would be most of the work.
    mask_head = RoIMaskHead(64, num_outputs=num_classes, depth=2, width=32, norm="batch", key=keys[4])
    return RCNN(
        backbone,
        neck,
        RPNHead(64, key=keys[2]),
        (box_head,),
        mask_head if masks else None,
        dialect=SMALL_DIALECT,
        num_classes=num_classes,
        anchor_sizes=ANCHORS,
    )
