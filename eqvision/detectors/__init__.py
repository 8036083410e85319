"""Detectors: from padded images to objects."""

from eqvision.detectors.centernet import (
    CenterNet,
    centernet_dla34,
    centernet_hourglass104,
    centernet_r18_dcn,
    centernet_resnet,
    decode_centers,
)
from eqvision.detectors.centernet2 import (
    CENTERNET2,
    CenterNet2,
    build_centernet2,
    centernet2_r50_fpn,
    centernet2_resnet,
    centernet2_vitdet_b,
)
from eqvision.detectors.centernet2_cells import CENTER_RULE, CenterRule
from eqvision.detectors.decode import decode_sigmoid, decode_softmax, scale_boxes
from eqvision.detectors.deformable_detr import DeformableDETR, deformable_detr
from eqvision.detectors.detr import DETR, detr
from eqvision.detectors.found import find_objects, found_in
from eqvision.detectors.owlvit import OWLVIT_SIZES, Example, OwlViT, OwlViTSize, like_object, owlvit
from eqvision.detectors.panoptic import PanopticSegments, panoptic_segments
from eqvision.detectors.queried_decode import batch_extent, decode_queried
from eqvision.detectors.rcnn import RCNN
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
from eqvision.detectors.rcnn_small import mask_rcnn_small
from eqvision.detectors.rcnn_stages import Stage
from eqvision.detectors.vitdet_rcnn import (
    cascade_mask_rcnn_vitdet_b,
    cascade_mask_rcnn_vitdet_h,
    cascade_mask_rcnn_vitdet_l,
    mask_rcnn_vitdet,
    mask_rcnn_vitdet_b,
    mask_rcnn_vitdet_h,
    mask_rcnn_vitdet_l,
    rcnn_convnext_fpn,
    rcnn_on_vitdet,
    rcnn_swin_fpn,
)

__all__ = [
    "CENTERNET2",
    "CENTER_RULE",
    "DETECTRON2",
    "DETR",
    "MMDET",
    "OWLVIT_SIZES",
    "RCNN",
    "RCNN_DIALECTS",
    "TORCHVISION",
    "CenterNet",
    "CenterNet2",
    "CenterRule",
    "DeformableDETR",
    "Example",
    "OwlViT",
    "OwlViTSize",
    "PanopticSegments",
    "ProposalRule",
    "RCNNDialect",
    "SampleRule",
    "Stage",
    "batch_extent",
    "build_centernet2",
    "build_rcnn",
    "cascade_mask_rcnn_r50_fpn",
    "cascade_mask_rcnn_vitdet_b",
    "cascade_mask_rcnn_vitdet_h",
    "cascade_mask_rcnn_vitdet_l",
    "centernet2_r50_fpn",
    "centernet2_resnet",
    "centernet2_vitdet_b",
    "centernet_dla34",
    "centernet_hourglass104",
    "centernet_r18_dcn",
    "centernet_resnet",
    "decode_centers",
    "decode_queried",
    "decode_rcnn",
    "decode_sigmoid",
    "decode_softmax",
    "deformable_detr",
    "detr",
    "faster_rcnn_r50_fpn",
    "faster_rcnn_r50_fpn_v2",
    "find_objects",
    "found_in",
    "like_object",
    "mask_rcnn_r50_fpn",
    "mask_rcnn_r50_fpn_v2",
    "mask_rcnn_small",
    "mask_rcnn_vitdet",
    "mask_rcnn_vitdet_b",
    "mask_rcnn_vitdet_h",
    "mask_rcnn_vitdet_l",
    "owlvit",
    "panoptic_segments",
    "rcnn_anchors",
    "rcnn_convnext_fpn",
    "rcnn_dialect",
    "rcnn_on_vitdet",
    "rcnn_resnet_fpn",
    "rcnn_swin_fpn",
    "scale_boxes",
    "scale_detections",
    "select_proposals",
]
