"""Recipes: functions that return the configuration of a run. ``RECIPES`` is the whole registry."""

from eqvision.recipes.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    EvalConfig,
    LogConfig,
    LoopConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TaskConfig,
    TrainConfig,
)
from eqvision.recipes.digits import digits
from eqvision.recipes.folder import arrays, folder
from eqvision.recipes.serialise import difference, from_dict, overlay, to_dict

RECIPES = {"arrays": arrays, "digits": digits, "folder": folder}

__all__ = [
    "RECIPES",
    "AugmentConfig",
    "CheckpointConfig",
    "DataConfig",
    "DistillConfig",
    "EvalConfig",
    "LogConfig",
    "LoopConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "TaskConfig",
    "TrainConfig",
    "arrays",
    "difference",
    "digits",
    "folder",
    "from_dict",
    "overlay",
    "to_dict",
]
