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

__all__ = [
    "CLIP_RESNET_SIZES",
    "CLIP_VIT_SIZES",
    "MAX_SCALE",
    "SIGLIP_SIZES",
    "Clip",
    "ClipResNetSize",
    "ClipViTSize",
    "ImageHead",
    "ImageTower",
    "SiglipSize",
    "TextHead",
    "clip_logits",
    "clip_resnet",
    "clip_vit",
    "siglip",
]
