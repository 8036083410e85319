"""Models of images and text together."""

from eqvision.multimodal.clip import MAX_SCALE, Clip, ImageHead, ImageTower, TextHead, clip_logits
from eqvision.multimodal.clip_models import (
    CLIP_RESNET_SIZES,
    CLIP_VIT_SIZES,
    ClipResNetSize,
    ClipViTSize,
    clip_resnet,
    clip_vit,
)
from eqvision.multimodal.siglip import SIGLIP_SIZES, SiglipSize, siglip
from eqvision.multimodal.templates import PHOTOS, PLAIN, TEMPLATES, check_templates, read_templates
from eqvision.multimodal.zero_shot import ZeroShotClassifier, check_prompts, class_vectors, zero_shot_classifier

__all__ = [
    "CLIP_RESNET_SIZES",
    "CLIP_VIT_SIZES",
    "MAX_SCALE",
    "PHOTOS",
    "PLAIN",
    "SIGLIP_SIZES",
    "TEMPLATES",
    "Clip",
    "ClipResNetSize",
    "ClipViTSize",
    "ImageHead",
    "ImageTower",
    "SiglipSize",
    "TextHead",
    "ZeroShotClassifier",
    "check_prompts",
    "check_templates",
    "class_vectors",
    "clip_logits",
    "clip_resnet",
    "clip_vit",
    "read_templates",
    "siglip",
    "zero_shot_classifier",
]
