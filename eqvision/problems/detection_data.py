"""Sources, transforms and shapes of a detection run, from its configuration."""

from typing import Any, NamedTuple

from eqvision.data.detection import (
    Buckets,
    CocoDetection,
    DetectionTransform,
    DigitScenes,
    detection_eval,
    detr_train,
    fit_eval,
    fixed_size_eval,
    fixed_size_train,
    large_scale_jitter,
    one_canvas,
    random_crop_train,
)
from eqvision.recipes.detection_config import DetectionDataConfig


class Plan(NamedTuple):
    """What happens to each image, and the shapes of batches."""

    transform: DetectionTransform
    buckets: Buckets


def load_detection(data: DetectionDataConfig, in_channels: int, split: str) -> Any:
    """The images of a split. Raises ValueError where the configuration names no path, and what sources raise."""
    if data.kind == "digits":
        length = data.length if split == "train" else None
        return DigitScenes(split, size=data.size, channels=in_channels, length=length, masks=False)
    if not data.path:
        raise ValueError(
            "data.kind 'coco' needs a path: --data.path PATH, an instances file or a folder with annotations/*.json"
        )
    return CocoDetection(data.path, split, in_channels=in_channels, on_corrupt=data.on_corrupt)


def train_plan(data: DetectionDataConfig) -> Plan:
    canvas, flip, jitter = one_canvas(*data.size), data.flip, data.color_jitter
    if data.transform == "detr":
        transform = detr_train(scales=data.scales, longest=data.longest, flip=flip, color_jitter=jitter)
        return Plan(transform, _buckets(data))
    if data.transform == "lsj":
        return Plan(large_scale_jitter(data.size, flip=flip, color_jitter=jitter), canvas)
    if data.transform == "crop":
        sides = (min(data.size) // 2, max(data.size))
        return Plan(random_crop_train(data.size, crop=sides, flip=flip, color_jitter=jitter), canvas)
    return Plan(fixed_size_train(data.size, flip=flip, color_jitter=jitter), canvas)


def eval_plan(data: DetectionDataConfig) -> Plan:
    if data.transform == "detr":
        return Plan(detection_eval(data.scales[-1], data.longest), _buckets(data))
    canvas = one_canvas(*data.size)
    return Plan(fit_eval(data.size) if data.transform == "lsj" else fixed_size_eval(data.size), canvas)


def _buckets(data: DetectionDataConfig) -> Buckets:
    """Wide, upright and square: images of the same shape share batches."""
    long, short = max(data.size), data.scales[-1]
    rounded = -(-short // 32) * 32
    return Buckets(((rounded, long), (long, rounded), (long, long)))
