"""Detectors: from padded images to objects."""

from eqvision.detectors.decode import decode_sigmoid, decode_softmax, scale_boxes
from eqvision.detectors.deformable_detr import DeformableDETR, deformable_detr
from eqvision.detectors.detr import DETR, detr
from eqvision.detectors.panoptic import PanopticSegments, panoptic_segments

__all__ = [
    "DETR",
    "DeformableDETR",
    "PanopticSegments",
    "decode_sigmoid",
    "decode_softmax",
    "deformable_detr",
    "detr",
    "panoptic_segments",
    "scale_boxes",
]
