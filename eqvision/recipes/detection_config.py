"""The configuration of a run that trains a detector. What it shares with other runs is in ``config.py``."""

from dataclasses import dataclass, field
from typing import Literal

from eqvision.losses.centernet import CenterNetConfig
from eqvision.losses.rcnn import RCNNLossConfig
from eqvision.losses.set_prediction import SetPredictionConfig
from eqvision.recipes.config import (
    CheckpointConfig,
    LogConfig,
    LoopConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
)


@dataclass(frozen=True)
class DetectorConfig:
    """Which detector of the zoo, and its options."""

    name: str = "deformable_detr_r50"
    """Name in the zoo; `eqvision list --kind detector` shows them all."""
    in_channels: int = 3
    """1 reads images as grey, 3 as RGB."""
    num_classes: int | None = None
    """Number of classes; None takes it from the data."""
    num_queries: int | None = None
    """Most objects that can be found in an image; None keeps the model's default."""
    norm: Literal["frozen", "batch"] | None = None
    """Batch norms of the backbone: frozen (constant, for pretrained weights) or batch (trained); None keeps the
    model's default."""
    dialect: Literal["torchvision", "detectron2", "mmdet"] | None = None
    """Whose rules an R-CNN follows (anchors, sampling, pixels under boxes); None keeps the model's default."""
    dropout: float | None = None
    """Fraction of activations dropped in training; None keeps the model's default."""
    remat: Literal["none", "dots", "full"] | None = None
    """What scanned layers recompute in the backward pass to save memory."""
    unroll: int | None = None
    """Layers compiled one after the other in each iteration of a scan."""


@dataclass(frozen=True)
class DetectionDataConfig:
    """Where images and boxes come from and how they are prepared."""

    kind: Literal["coco", "digits"] = "coco"
    """coco: a COCO instances file with its images. digits: scenes of embedded handwritten digits."""
    path: str = ""
    """Folder with annotations/*.json and the images of each split; not used by `digits`."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = "val"
    """Split to evaluate on."""
    length: int | None = None
    """digits: number of training scenes; None takes 4096."""
    transform: Literal["detr", "resize", "lsj", "shifted", "fixed"] = "fixed"
    """detr: multi-scale with crops. resize: multi-scale without. lsj: large-scale jitter, which keeps the shape of
    images and pads. shifted: CenterNet's crops of many sizes and places. fixed: both sides to the size. Each with
    `flip`."""
    size: tuple[int, int] = (320, 320)
    """Height and width of the batch's images; detr, resize: of the largest bucket, which holds every scale."""
    scales: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """detr, resize: lengths of the shorter side in training, of which the last is that of evaluation."""
    longest: int = 1333
    """detr, resize: largest length of the longer side."""
    jitter: tuple[float, float] = (0.1, 2.0)
    """lsj: smallest and largest factor of the size in training; evaluation has 1."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    keep_empty: bool = True
    """coco: train on images without objects too."""
    max_objects: int = 100
    """Objects of an image that can be targets; of more, the largest are kept."""
    mask_crop: int = 112
    """Side of the small squares that hold the masks of training objects, each of what lies in its box."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of the channels in [0, 1]; one value serves all channels."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of the channels in [0, 1]; one value serves all channels."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """What a corrupt image does: stop the run, or be counted and weigh nothing."""
    num_threads: int = 2
    """Threads that read and transform images."""


@dataclass(frozen=True)
class DetectionConfig:
    """A run that trains a detector: a pure function of this configuration (with its seed) and the step."""

    out: str = ""
    """Run folder; empty means runs/RECIPE."""
    seed: int = 0
    """Seed of initialisation, sample order, augmentation and dropout."""
    init: str = ""
    """What the run starts from: a run folder, or published weights as MODEL or MODEL:SOURCE (file, hf:organisation/
    repository, URL or tag); of a detector, or of an image classifier for the backbone. Other classes start fresh."""
    allow_config_change: bool = False
    """Resume although options differ that change the numbers of the run."""
    model: DetectorConfig = field(default_factory=DetectorConfig)
    task: SetPredictionConfig | RCNNLossConfig | CenterNetConfig = field(default_factory=SetPredictionConfig)
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)
