"""The configuration of a run that pre-trains a masked autoencoder. What it shares with others is in ``config.py``."""

from dataclasses import dataclass, field
from typing import Literal

from eqvision.recipes.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoopConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
)


@dataclass(frozen=True)
class MaskedModelConfig:
    """Which masked autoencoder, and its options."""

    name: str = "mae_vit_b16"
    """mae_vit_b16, mae_vit_l16, mae_vit_h14 as published; mae_vit_xs4 for images of 32 pixels."""
    image_size: int = 224
    """Height and width in pixels that images are brought to."""
    in_channels: int = 3
    """1 reads images as grey, 3 as RGB."""
    mask_ratio: float = 0.75
    """Share of the patches that the encoder does not see."""
    remat: Literal["none", "dots", "full"] = "none"
    """What is recomputed in the backward pass to save memory."""
    unroll: int = 1
    """Blocks compiled one after the other in each iteration of a stack."""
    attention: Literal["xla", "cudnn", "blocked"] = "xla"
    """Implementation of attention."""


@dataclass(frozen=True)
class MaskedTaskConfig:
    """What the decoder is asked for."""

    normalise_pixels: bool = True
    """Targets are the pixels of each patch with mean 0 and variance 1 (He et al. 2022, table 1d), else plain pixels."""


@dataclass(frozen=True)
class MaskedEvalConfig:
    """What the frozen encoder is worth, measured beside the loss of the test split; this needs classes."""

    evaluators: tuple[Literal["linear_probe", "few_shot", "knn"], ...] = ()
    """Any of linear_probe, few_shot, knn."""
    every: int | None = None
    """Steps between them, a multiple of loop.eval_every; None runs them at the end only."""
    pool: Literal["mean", "token"] = "mean"
    """Features of an image: the mean of its patches, or the class token."""


@dataclass(frozen=True)
class MaskedConfig:
    """A run that trains a masked autoencoder: a pure function of this configuration (with its seed) and the step."""

    out: str = ""
    """Run folder; empty means runs/RECIPE."""
    seed: int = 0
    """Seed of initialisation, sample order, augmentation and masks."""
    init: str = ""
    """What the run starts from: the folder of another such run, or published weights as MODEL:SOURCE."""
    allow_config_change: bool = False
    """Resume although options differ that change the numbers of the run."""
    model: MaskedModelConfig = field(default_factory=MaskedModelConfig)
    task: MaskedTaskConfig = field(default_factory=MaskedTaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: MaskedEvalConfig = field(default_factory=MaskedEvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
