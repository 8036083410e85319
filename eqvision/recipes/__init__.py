"""Recipes: functions that return the configuration of a run. ``RECIPES`` is the whole registry."""

from eqvision.recipes.ade20k_segmenter import ade20k_segmenter_s16_mask
from eqvision.recipes.camvid_unet import camvid_unet
from eqvision.recipes.cityscapes import cityscapes_deeplabv3plus_r50
from eqvision.recipes.coco_centernet import coco_centernet_r18
from eqvision.recipes.coco_deformable_detr import coco_deformable_detr_r50
from eqvision.recipes.coco_detr import coco_detr_r50
from eqvision.recipes.coco_rcnn import coco_faster_rcnn_r50_fpn, coco_mask_rcnn_r50_fpn
from eqvision.recipes.coco_vitdet import coco_vitdet_b
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
from eqvision.recipes.contrastive_config import (
    ClipModelConfig,
    ContrastiveConfig,
    ContrastiveLossConfig,
    PairsDataConfig,
    TokenizerConfig,
)
from eqvision.recipes.detect import detect
from eqvision.recipes.detection_config import DetectionConfig, DetectionDataConfig, DetectorConfig
from eqvision.recipes.digits import digits
from eqvision.recipes.digits_clip import digits_clip
from eqvision.recipes.digits_detr import digits_detr
from eqvision.recipes.digits_mask_rcnn import digits_mask_rcnn
from eqvision.recipes.digits_owlvit import digits_owlvit
from eqvision.recipes.digits_sam import digits_sam
from eqvision.recipes.digits_segmentation import digits_segmentation
from eqvision.recipes.folder import arrays, folder
from eqvision.recipes.folder_mae import folder_mae
from eqvision.recipes.glue_bert import glue_bert_b
from eqvision.recipes.glue_config import GlueConfig, GlueDataConfig, GlueTokenizerConfig, TextClassifierConfig
from eqvision.recipes.imagenet_mae import imagenet_mae_b16, imagenet_mae_b16_finetune, imagenet_mae_b16_probe
from eqvision.recipes.instances import instances
from eqvision.recipes.lvis_owlvit import lvis_owlvit_b16
from eqvision.recipes.masked_config import MaskedConfig, MaskedEvalConfig, MaskedModelConfig, MaskedTaskConfig
from eqvision.recipes.open_vocabulary_config import (
    OpenVocabularyConfig,
    OpenVocabularyDataConfig,
    OpenVocabularyModelConfig,
)
from eqvision.recipes.pairs_clip import pairs_clip_b32, pairs_siglip_b16
from eqvision.recipes.pets_unet import pets_unet
from eqvision.recipes.pretrain_text import c4_t5_base, wikibooks_bert_b
from eqvision.recipes.prompted_config import PromptedConfig, PromptedLossConfig, PromptedModelConfig
from eqvision.recipes.sam_finetune import sam_finetune
from eqvision.recipes.segmentation_config import SegmentationConfig, SegmentationDataConfig, SegmenterConfig
from eqvision.recipes.serialise import difference, from_dict, overlay, to_dict
from eqvision.recipes.text_config import (
    LanguageConfig,
    LanguageModelConfig,
    LanguageTaskConfig,
    TextDataConfig,
    TextTokenizerConfig,
)
from eqvision.recipes.text_small import text_bert, text_t5

RunConfig = (
    TrainConfig
    | DetectionConfig
    | SegmentationConfig
    | PromptedConfig
    | ContrastiveConfig
    | OpenVocabularyConfig
    | MaskedConfig
    | LanguageConfig
    | GlueConfig
)
"""What the loop runs."""

RECIPES = {
    "ade20k_segmenter_s16_mask": ade20k_segmenter_s16_mask,
    "arrays": arrays,
    "c4_t5_base": c4_t5_base,
    "camvid_unet": camvid_unet,
    "cityscapes_deeplabv3plus_r50": cityscapes_deeplabv3plus_r50,
    "coco_centernet_r18": coco_centernet_r18,
    "coco_deformable_detr_r50": coco_deformable_detr_r50,
    "coco_detr_r50": coco_detr_r50,
    "coco_faster_rcnn_r50_fpn": coco_faster_rcnn_r50_fpn,
    "coco_mask_rcnn_r50_fpn": coco_mask_rcnn_r50_fpn,
    "coco_vitdet_b": coco_vitdet_b,
    "detect": detect,
    "digits": digits,
    "digits_clip": digits_clip,
    "digits_detr": digits_detr,
    "digits_mask_rcnn": digits_mask_rcnn,
    "digits_owlvit": digits_owlvit,
    "digits_sam": digits_sam,
    "digits_segmentation": digits_segmentation,
    "folder": folder,
    "folder_mae": folder_mae,
    "glue_bert_b": glue_bert_b,
    "imagenet_mae_b16": imagenet_mae_b16,
    "imagenet_mae_b16_finetune": imagenet_mae_b16_finetune,
    "imagenet_mae_b16_probe": imagenet_mae_b16_probe,
    "instances": instances,
    "pairs_clip_b32": pairs_clip_b32,
    "pairs_siglip_b16": pairs_siglip_b16,
    "lvis_owlvit_b16": lvis_owlvit_b16,
    "pets_unet": pets_unet,
    "sam_finetune": sam_finetune,
    "text_bert": text_bert,
    "text_t5": text_t5,
    "wikibooks_bert_b": wikibooks_bert_b,
}

__all__ = [
    "RECIPES",
    "AugmentConfig",
    "CheckpointConfig",
    "ClipModelConfig",
    "ContrastiveConfig",
    "ContrastiveLossConfig",
    "DataConfig",
    "DetectionConfig",
    "DetectionDataConfig",
    "DetectorConfig",
    "DistillConfig",
    "EvalConfig",
    "GlueConfig",
    "GlueDataConfig",
    "GlueTokenizerConfig",
    "LanguageConfig",
    "LanguageModelConfig",
    "LanguageTaskConfig",
    "LogConfig",
    "LoopConfig",
    "MaskedConfig",
    "MaskedEvalConfig",
    "MaskedModelConfig",
    "MaskedTaskConfig",
    "MeshConfig",
    "ModelConfig",
    "OpenVocabularyConfig",
    "OpenVocabularyDataConfig",
    "OpenVocabularyModelConfig",
    "OptimizerConfig",
    "PairsDataConfig",
    "PromptedConfig",
    "PromptedLossConfig",
    "PromptedModelConfig",
    "RunConfig",
    "ScheduleConfig",
    "SegmentationConfig",
    "SegmentationDataConfig",
    "SegmenterConfig",
    "TaskConfig",
    "TextClassifierConfig",
    "TextDataConfig",
    "TextTokenizerConfig",
    "TokenizerConfig",
    "TrainConfig",
    "ade20k_segmenter_s16_mask",
    "arrays",
    "c4_t5_base",
    "camvid_unet",
    "cityscapes_deeplabv3plus_r50",
    "coco_centernet_r18",
    "coco_deformable_detr_r50",
    "coco_detr_r50",
    "coco_faster_rcnn_r50_fpn",
    "coco_mask_rcnn_r50_fpn",
    "coco_vitdet_b",
    "detect",
    "difference",
    "digits",
    "digits_clip",
    "digits_detr",
    "digits_mask_rcnn",
    "digits_owlvit",
    "digits_sam",
    "digits_segmentation",
    "folder",
    "folder_mae",
    "from_dict",
    "imagenet_mae_b16",
    "imagenet_mae_b16_finetune",
    "imagenet_mae_b16_probe",
    "instances",
    "lvis_owlvit_b16",
    "overlay",
    "pairs_clip_b32",
    "pairs_siglip_b16",
    "pets_unet",
    "sam_finetune",
    "text_bert",
    "text_t5",
    "to_dict",
    "wikibooks_bert_b",
]
