"""Sources, transforms and shapes of a segmentation run, from its configuration."""

from typing import Any, NamedTuple

from eqvision.data.detection.sizes import Size
from eqvision.data.segmentation import (
    DigitSegmentation,
    FolderSegmentation,
    SegmentationTransform,
    fixed_size_labels_eval,
    fixed_size_labels_train,
    segmentation_eval,
    segmentation_train,
)
from eqvision.recipes.segmentation_config import SegmentationDataConfig


class Plan(NamedTuple):
    """What happens to each image, and the shape of batches; None takes that of the images."""

    transform: SegmentationTransform
    canvas: Size | None


def load_segmentation(
    data: SegmentationDataConfig, in_channels: int, split: str, class_names: tuple[str, ...] | None = None
) -> Any:
    """The images of a split; ``class_names`` are those of the training split.

    Raises ValueError where the configuration names no path, for a split without images, and what sources raise.
    """
    if data.kind == "digits":
        length = data.length if split == "train" else None
        return DigitSegmentation(split, size=data.size, channels=in_channels, length=length)
    if not data.path:
        raise ValueError("data.kind 'folder' needs a path: --data.path PATH, a folder with train/ and train_labels/")
    source = FolderSegmentation(
        data.path,
        split,
        layout=data.layout or None,
        class_names=class_names,
        void_labels=data.void,
        in_channels=in_channels,
        on_corrupt=data.on_corrupt,
    )
    if not len(source):
        raise ValueError(f"{data.path} has no images in its split {split}")
    return source


def check_splits(data: SegmentationDataConfig) -> None:
    """Raise ValueError where both splits are the same."""
    if data.train_split == data.test_split:
        raise ValueError(f"--data.train-split and --data.test-split are both {data.train_split}; evaluate on another")


def train_plan(data: SegmentationDataConfig) -> Plan:
    if data.transform == "fixed":
        transform = fixed_size_labels_train(data.size, flip=data.flip, color_jitter=data.color_jitter)
    else:
        transform = segmentation_train(
            data.size, scale=data.scale, shortest=data.shortest, flip=data.flip, color_jitter=data.color_jitter
        )
    return Plan(transform, data.size)


def eval_plan(data: SegmentationDataConfig) -> Plan:
    if data.transform == "fixed":
        return Plan(fixed_size_labels_eval(data.size), data.size)
    return Plan(segmentation_eval(data.shortest), None)
