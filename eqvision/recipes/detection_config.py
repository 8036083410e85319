"""The configuration of a run that trains a detector. What it shares with other runs is in ``config.py``."""

from dataclasses import dataclass, field
from typing import Literal

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
    """JSON file, or a folder with annotations/*.json and the images of each split; not used by `digits`."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = "val"
    """Split to evaluate on."""
    length: int | None = None
    """digits: number of training scenes; None takes 4096."""
    transform: Literal["detr", "crop", "lsj", "fixed"] = "fixed"
    """detr: multi-scale with crops. crop: a random region in half of the cases, then the fixed size. lsj: large-scale
    jitter. fixed: both sides to the size. Each with flips, but for digits."""
    size: tuple[int, int] = (320, 320)
    """Height and width of the batch's images; detr: of the largest bucket, which holds every scale."""
    scales: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """detr: lengths of the shorter side in training, of which the last is that of evaluation."""
    longest: int = 1333
    """detr: largest length of the longer side."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    max_objects: int = 100
    """Objects of an image that can be targets; of more, the largest are kept."""
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
    """Run folder whose parameters the run starts from: a detector's, or an image classifier's for the backbone."""
    allow_config_change: bool = False
    """Resume although options differ that change the numbers of the run."""
    model: DetectorConfig = field(default_factory=DetectorConfig)
    task: SetPredictionConfig = field(default_factory=SetPredictionConfig)
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)
