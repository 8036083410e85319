"""Sources, transforms and shapes of a detection run, from its configuration."""

from pathlib import Path
from typing import Any, NamedTuple

from eqvision.data.detection import (
    Buckets,
    Categories,
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
    shifted_crop_train,
)
from eqvision.data.listing import SPLITS
from eqvision.names import nearest
from eqvision.recipes.detection_config import DetectionDataConfig

LAYOUT = "annotations/{train,val}.json and the images in {train,val}/"


class Plan(NamedTuple):
    """What happens to each image, and the shapes of batches."""

    transform: DetectionTransform
    buckets: Buckets


def load_detection(
    data: DetectionDataConfig,
    in_channels: int,
    split: str,
    categories: Categories | None = None,
    *,
    masks: bool = False,
) -> Any:
    """The images of a split, labelled by ``categories`` where they are given; a path that is a file is the split.

    Raises ValueError where the configuration names no path, for a split without images and for one with a category
    that is not in ``categories``; UnknownNameError for an unknown split; and what sources raise.
    """
    if data.kind == "digits":
        length = data.length if split == "train" else None
        return DigitScenes(split, size=data.size, channels=in_channels, length=length, masks=masks)
    if not data.path:
        raise ValueError(f"data.kind 'coco' needs a path: --data.path PATH, a folder with {LAYOUT}")
    if split not in SPLITS:
        raise nearest(split, list(SPLITS), "split of --data.path")
    one_file = Path(data.path).expanduser().is_file()
    source = CocoDetection(
        data.path,
        None if one_file else split,
        categories=categories,
        in_channels=in_channels,
        masks=masks,
        keep_empty=data.keep_empty or split != data.train_split,
        on_corrupt=data.on_corrupt,
    )
    if not len(source):
        raise ValueError(f"{source.json} lists no images")
    if not source.class_names:
        raise ValueError(f"{source.json} lists no categories, so there is nothing to tell apart")
    return source


def check_splits(data: DetectionDataConfig) -> None:
    """Raise ValueError where the path is one file and where both splits are the same."""
    if data.kind == "digits":
        return
    if Path(data.path).expanduser().is_file():
        raise ValueError(f"--data.path {data.path} is one file, and training needs two splits: a folder with {LAYOUT}")
    if data.train_split == data.test_split:
        raise ValueError(f"--data.train-split and --data.test-split are both {data.train_split}; evaluate on another")


def train_plan(data: DetectionDataConfig) -> Plan:
    canvas, flip, jitter = one_canvas(*data.size), data.flip, data.color_jitter
    if data.transform == "detr":
        transform = detr_train(scales=data.scales, longest=data.longest, flip=flip, color_jitter=jitter)
        return Plan(transform, _buckets(data))
    if data.transform == "resize":
        transform = detr_train(
            scales=data.scales,
            longest=data.longest,
            crop_probability=0,
            flip=flip,
            color_jitter=jitter,
            rounding="detectron2",
        )
        return Plan(transform, _buckets(data))
    if data.transform == "shifted":
        return Plan(shifted_crop_train(data.size, flip=flip, color_jitter=jitter), canvas)
    if data.transform == "lsj":
        return Plan(large_scale_jitter(data.size, scale=data.jitter, flip=flip, color_jitter=jitter), canvas)
    return Plan(fixed_size_train(data.size, flip=flip, color_jitter=jitter), canvas)


def eval_plan(data: DetectionDataConfig) -> Plan:
    if data.transform == "detr":
        return Plan(detection_eval(data.scales[-1], data.longest), _buckets(data))
    if data.transform == "resize":
        return Plan(detection_eval(data.scales[-1], data.longest, rounding="detectron2"), _buckets(data))
    canvas = one_canvas(*data.size)
    return Plan(fit_eval(data.size) if data.transform in ("lsj", "shifted") else fixed_size_eval(data.size), canvas)


def _buckets(data: DetectionDataConfig) -> Buckets:
    """Wide, upright and square: images of the same shape share batches."""
    long, short = max(data.size), data.scales[-1]
    rounded = -(-short // 32) * 32
    return Buckets(((rounded, long), (long, rounded), (long, long)))
