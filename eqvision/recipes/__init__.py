"""Recipes: functions that return the configuration of a run. ``RECIPES`` is the whole registry."""

from eqvision.recipes.config import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TaskConfig,
    TrainConfig,
    difference,
    from_dict,
    to_dict,
)
from eqvision.recipes.digits import digits
from eqvision.recipes.folder import arrays, folder

RECIPES = {"arrays": arrays, "digits": digits, "folder": folder}

__all__ = [
    "RECIPES",
    "DataConfig",
    "LoopConfig",
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
    "to_dict",
]
