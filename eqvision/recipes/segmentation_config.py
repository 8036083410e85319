"""The configuration of a run that trains a segmenter. What it shares with other runs is in ``config.py``."""

from dataclasses import dataclass, field
from typing import Literal

from eqvision.losses.segmentation import SegmentationLossConfig
from eqvision.recipes.config import (
    CheckpointConfig,
    LogConfig,
    LoopConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
)


@dataclass(frozen=True)
class SegmenterConfig:
    """Which segmenter of the zoo, and its options."""

    name: str = "unet_small"
    """Name in the zoo; `eqvision list --kind segmenter` shows them all."""
    in_channels: int = 3
    """1 reads images as grey, 3 as RGB."""
    num_classes: int | None = None
    """Number of classes; None takes it from the data."""
    norm: Literal["none", "batch", "group", "frozen"] | None = None
    """Norm of the convolutions, of a network with frozen norms that of its backbone; None keeps the model's own."""
    auxiliary_weight: float = 0.4
    """Factor of the losses of auxiliary heads, where the model has any."""


@dataclass(frozen=True)
class SegmentationDataConfig:
    """Where images and labels come from and how they are prepared."""

    kind: Literal["folder", "digits"] = "folder"
    """folder: images with label pictures beside them. digits: scenes of embedded handwritten digits."""
    path: str = ""
    """Folder of the data; not used by `digits`."""
    layout: str = ""
    """folder: how files are arranged: folder, cityscapes, ade20k, coco_stuff or pets; empty looks for all."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = "val"
    """Split to evaluate on."""
    length: int | None = None
    """digits: number of training scenes; None takes 4096."""
    void: tuple[int, ...] = ()
    """folder: values of label pictures that are no class, beside 255."""
    transform: Literal["crop", "fixed"] = "crop"
    """crop: scaled, and a random region of the size; evaluation sees whole images. fixed: both sides to the size."""
    size: tuple[int, int] = (192, 256)
    """Height and width of training images."""
    scale: tuple[float, float] = (0.5, 2.0)
    """crop: smallest and largest factor of the image."""
    shortest: int | None = None
    """crop: length to which the shorter side of every image is brought first, in training and evaluation."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of the channels in [0, 1]; one value serves all channels."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of the channels in [0, 1]; one value serves all channels."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """What a corrupt image does: stop the run, or be counted and weigh nothing."""
    num_threads: int = 2
    """Threads that read and transform images."""


@dataclass(frozen=True)
class SegmentationConfig:
    """A run that trains a segmenter: a pure function of this configuration (with its seed) and the step."""

    out: str = ""
    """Run folder; empty means runs/RECIPE."""
    seed: int = 0
    """Seed of initialisation, sample order, augmentation and dropout."""
    init: str = ""
    """What the run starts from: a run folder, or published weights as MODEL or MODEL:SOURCE (file, hf:organisation/
    repository, URL or tag); of a segmenter, or of an image classifier for the backbone. Other classes start fresh."""
    allow_config_change: bool = False
    """Resume although options differ that change the numbers of the run."""
    model: SegmenterConfig = field(default_factory=SegmenterConfig)
    task: SegmentationLossConfig = field(default_factory=SegmentationLossConfig)
    data: SegmentationDataConfig = field(default_factory=SegmentationDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)
