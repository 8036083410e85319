"""torchvision beside a CPU build of PyTorch.

torchvision's wheel holds operators that are compiled against CUDA. Beside a CPU build of PyTorch they cannot be loaded,
and then ``import torchvision`` fails, and with it timm and transformers, which import it where it is installed. Its
Python code needs two of them to be declared. Detectors run two: non-maximum suppression and RoIAlign, which are given
here in PyTorch, with the results of the kernels.
"""

import importlib.util
import math
import sys
from typing import Any

import numpy as np

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def usable_torchvision() -> None:
    """Give what ``import torchvision`` misses. Call it before the first import of timm or transformers."""
    if importlib.util.find_spec("torchvision") is None or importlib.util.find_spec("torch") is None:
        return
    import torch

    try:
        import torchvision
    except RuntimeError as error:  # operator torchvision::nms does not exist
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(name + NMS)
        _kept.append(library)  # the declarations go with the object
        import torchvision
    if not has_kernels():
        torchvision.ops.nms = torchvision.ops.boxes.nms = greedy_nms
        sys.modules["torchvision.ops.roi_align"]._roi_align = roi_align  # the package's name is that of its function


def has_kernels() -> bool:
    """Whether torchvision runs its own compiled operators."""
    from torchvision import extension

    return extension._has_ops()


def greedy_nms(boxes: Any, scores: Any, iou_threshold: float) -> Any:
    """Indices of kept boxes, best first. As the kernel compares: overlaps in float32, the threshold in float64."""
    import torch
    from torchvision.ops import box_iou

    order = torch.argsort(scores, descending=True, stable=True)
    above = (box_iou(boxes[order], boxes[order]).double() > iou_threshold).numpy()
    left, kept = np.ones(len(order), bool), []
    for row in range(len(order)):
        if left[row]:
            kept.append(row)
            left &= ~above[row]
    return order[kept]


def roi_align(maps: Any, rois: Any, scale: float, height: int, width: int, sampling_ratio: int, aligned: bool) -> Any:
    """One box after the other: its samples of rows, of these the samples of columns, and the mean of each bin.

    torchvision's own form in Python takes minutes to compile, gigabytes where the samples follow from the boxes, and
    reads the border for samples more than a cell outside of the map, where the kernel reads zeros.
    """
    import torch

    starts = rois[:, 1:3] * scale - (0.5 if aligned else 0.0)
    sides = rois[:, 3:5] * scale - (0.5 if aligned else 0.0) - starts
    sides = sides if aligned else sides.clamp(min=1.0)
    values = []
    for image, (x, y), (wide, tall) in zip(rois[:, 0].tolist(), starts.tolist(), sides.tolist(), strict=True):
        rows = _sampled(maps[int(image)], 1, y, tall, height, sampling_ratio)
        values.append(_sampled(rows, 2, x, wide, width, sampling_ratio))
    return torch.stack(values) if values else maps.new_zeros((0, maps.shape[1], height, width))


def _sampled(maps: Any, axis: int, start: float, side: float, bins: int, sampling_ratio: int) -> Any:
    """Bilinear samples along ``axis`` of (channels, y, x), and their mean in each bin."""
    import torch

    cells, samples = maps.shape[axis], sampling_ratio if sampling_ratio > 0 else max(0, math.ceil(side / bins))
    at = start + (torch.arange(bins * samples) + 0.5) * (side / max(1, bins * samples))
    near = (at >= -1) & (at <= cells)
    at = at.clamp(0, cells - 1)
    low = at.long()
    high = (low + 1).clamp(max=cells - 1)
    share = (at - low).reshape(-1, *[1] * (2 - axis))
    values = maps.index_select(axis, low) * (1 - share) + maps.index_select(axis, high) * share
    values = values * near.reshape(share.shape)
    return values.unflatten(axis, (bins, samples)).sum(axis + 1) / max(1, samples)


_kept: list = []
