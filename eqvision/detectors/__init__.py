"""Detectors: from padded images to objects."""

from eqvision.detectors.centernet import (
    CenterNet,
    centernet_dla34,
    centernet_hourglass104,
    centernet_r18_dcn,
    centernet_resnet,
    decode_centers,
)
from eqvision.detectors.decode import decode_sigmoid, decode_softmax, scale_boxes
from eqvision.detectors.deformable_detr import DeformableDETR, deformable_detr
from eqvision.detectors.detr import DETR, detr
from eqvision.detectors.panoptic import PanopticSegments, panoptic_segments
from eqvision.detectors.rcnn import RCNN, Stage
from eqvision.detectors.rcnn_decode import decode_rcnn, scale_detections
from eqvision.detectors.rcnn_dialects import (
    DETECTRON2,
    MMDET,
    RCNN_DIALECTS,
    TORCHVISION,
    ProposalRule,
    RCNNDialect,
    SampleRule,
    rcnn_dialect,
)
from eqvision.detectors.rcnn_models import (
    build_rcnn,
    cascade_mask_rcnn_r50_fpn,
    faster_rcnn_r50_fpn,
    faster_rcnn_r50_fpn_v2,
    mask_rcnn_r50_fpn,
    mask_rcnn_r50_fpn_v2,
    rcnn_resnet_fpn,
)
from eqvision.detectors.rcnn_proposals import rcnn_anchors, select_proposals

__all__ = [
    "DETECTRON2",
    "DETR",
    "MMDET",
    "RCNN",
    "RCNN_DIALECTS",
    "TORCHVISION",
    "CenterNet",
    "DeformableDETR",
    "PanopticSegments",
    "ProposalRule",
    "RCNNDialect",
    "SampleRule",
    "Stage",
    "build_rcnn",
    "cascade_mask_rcnn_r50_fpn",
    "centernet_dla34",
    "centernet_hourglass104",
    "centernet_r18_dcn",
    "centernet_resnet",
    "decode_centers",
    "decode_rcnn",
    "decode_sigmoid",
    "decode_softmax",
    "deformable_detr",
    "detr",
    "faster_rcnn_r50_fpn",
    "faster_rcnn_r50_fpn_v2",
    "mask_rcnn_r50_fpn",
    "mask_rcnn_r50_fpn_v2",
    "panoptic_segments",
    "rcnn_anchors",
    "rcnn_dialect",
    "rcnn_resnet_fpn",
    "scale_boxes",
    "scale_detections",
    "select_proposals",
]
