"""Pure functions without parameters."""

from eqvision.ops.assignment import (
    MATCHERS,
    Matcher,
    check_costs,
    greedy,
    hungarian,
    lazy,
    matcher_by_name,
    scipy_assignment,
    sinkhorn,
)
from eqvision.ops.boxes import (
    box_area,
    clip_boxes,
    cxcywh_to_xyxy,
    elementwise_ciou,
    elementwise_diou,
    elementwise_giou,
    elementwise_iou,
    pairwise_giou,
    pairwise_iou,
    pairwise_l1,
    xywh_to_xyxy,
    xyxy_to_cxcywh,
    xyxy_to_xywh,
)
from eqvision.ops.collectives import DATA_AXES, global_sum, vary_like, varying_axes
from eqvision.ops.deformable import multi_scale_deformable_sampling
from eqvision.ops.resize import resize_images
from eqvision.ops.torch_resize import resize_bicubic, resize_bilinear, resize_nearest

__all__ = [
    "DATA_AXES",
    "MATCHERS",
    "Matcher",
    "box_area",
    "check_costs",
    "clip_boxes",
    "cxcywh_to_xyxy",
    "elementwise_ciou",
    "elementwise_diou",
    "elementwise_giou",
    "elementwise_iou",
    "global_sum",
    "greedy",
    "hungarian",
    "lazy",
    "matcher_by_name",
    "multi_scale_deformable_sampling",
    "pairwise_giou",
    "pairwise_iou",
    "pairwise_l1",
    "resize_bicubic",
    "resize_bilinear",
    "resize_images",
    "resize_nearest",
    "scipy_assignment",
    "sinkhorn",
    "vary_like",
    "varying_axes",
    "xywh_to_xyxy",
    "xyxy_to_cxcywh",
    "xyxy_to_xywh",
]
