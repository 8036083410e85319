"""The configuration of a run that trains a model with prompts (SAM). What it shares with others is in ``config.py``."""

from dataclasses import dataclass, field

from eqvision.recipes.config import (
    CheckpointConfig,
    LogConfig,
    LoopConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from eqvision.recipes.detection_config import DetectionDataConfig


@dataclass(frozen=True)
class PromptedModelConfig:
    """Which model with prompts of the zoo, and its options."""

    name: str = "sam_vit_b"
    """Name in the zoo; `eqvision list --kind prompted` shows them all."""
    drop_path: float | None = None
    """Largest rate at which blocks of the image encoder are left out in training; None keeps the model's own."""
    train_encoder: bool = True
    """Whether the image encoder learns; without, its gradients are not computed and a step costs a third."""


@dataclass(frozen=True)
class PromptedLossConfig:
    """Rounds of prompts as if a person clicked, and the weights of the loss (Kirillov et al. 2023, appendix A)."""

    points: int = 8
    """Rounds with a new point where the last mask was wrong; three more rounds have the first prompt, and none."""
    focal: float = 20.0
    """Weight of the focal loss of the best mask."""
    dice: float = 1.0
    """Weight of the dice loss of the best mask."""
    iou: float = 1.0
    """Weight of the squared error of the expected IoU."""
    clicks: int = 5
    """Evaluation: clicks after which the IoU is measured."""


@dataclass(frozen=True)
class PromptedConfig:
    """A run that trains a model with prompts: a pure function of this configuration (with its seed) and the step."""

    out: str = ""
    """Run folder; empty means runs/RECIPE."""
    seed: int = 0
    """Seed of initialisation, sample order, augmentation and prompts."""
    init: str = ""
    """What the run starts from: a run folder, or published weights as MODEL or MODEL:SOURCE (file, hf:organisation/
    repository, URL or tag)."""
    allow_config_change: bool = False
    """Resume although options differ that change the numbers of the run."""
    model: PromptedModelConfig = field(default_factory=PromptedModelConfig)
    task: PromptedLossConfig = field(default_factory=PromptedLossConfig)
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)
