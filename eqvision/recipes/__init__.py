"""Recipes: functions that return the configuration of a run. ``RECIPES`` is the whole registry."""

from eqvision.recipes.coco_deformable_detr import coco_deformable_detr_r50
from eqvision.recipes.coco_detr import coco_detr_r50
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
from eqvision.recipes.detect import detect
from eqvision.recipes.detection_config import DetectionConfig, DetectionDataConfig, DetectorConfig
from eqvision.recipes.digits import digits
from eqvision.recipes.digits_detr import digits_detr
from eqvision.recipes.folder import arrays, folder
from eqvision.recipes.serialise import difference, from_dict, overlay, to_dict

RunConfig = TrainConfig | DetectionConfig
"""What the loop runs."""

RECIPES = {
    "arrays": arrays,
    "coco_deformable_detr_r50": coco_deformable_detr_r50,
    "coco_detr_r50": coco_detr_r50,
    "detect": detect,
    "digits": digits,
    "digits_detr": digits_detr,
    "folder": folder,
}

__all__ = [
    "RECIPES",
    "AugmentConfig",
    "CheckpointConfig",
    "DataConfig",
    "DetectionConfig",
    "DetectionDataConfig",
    "DetectorConfig",
    "DistillConfig",
    "EvalConfig",
    "LogConfig",
    "LoopConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
    "TaskConfig",
    "TrainConfig",
    "arrays",
    "coco_deformable_detr_r50",
    "coco_detr_r50",
    "detect",
    "difference",
    "digits",
    "digits_detr",
    "folder",
    "from_dict",
    "overlay",
    "to_dict",
]
