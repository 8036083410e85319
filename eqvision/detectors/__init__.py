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

__all__ = [
    "DETR",
    "CenterNet",
    "DeformableDETR",
    "PanopticSegments",
    "centernet_dla34",
    "centernet_hourglass104",
    "centernet_r18_dcn",
    "centernet_resnet",
    "decode_centers",
    "decode_sigmoid",
    "decode_softmax",
    "deformable_detr",
    "detr",
    "panoptic_segments",
    "scale_boxes",
]
